package microvm

import (
	"context"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// A machine is sent beside a snapshot that both sides have. Where little has changed since it was cloned, that snapshot says only
// what it was cloned from and which layers its disk stands upon, which nobody changes and the other side may have already; all
// else is in the stream.

// lean decides whether a machine is sent so. own is how many bytes of its memory's pages are its own, top what the uppermost
// layer of its disk takes. Pages take about a quarter in the stream, so that this is some MB: more is worth being sent as a
// snapshot, which a connection that breaks does not undo, and which is described by other snapshots that are there.
func lean(o origin, own, top int64) bool {
	const few = 8 << 20 // bytes of a stream
	return len(o.Base) > 0 && len(o.Base) <= maxBase && len(o.Layers) > 1 && own/4+top <= few
}

// goAhead makes the snapshot of a machine beside which it can be sent, if little has changed of it. done is false when much
// has: then nothing was done. The box is held.
func (r *Runtime) goAhead(ctx context.Context, b *box, v *vm, dir string) (done bool, err error) {
	if err := v.mustTell("move"); err != nil {
		return false, err
	}
	rec := b.Record()
	o := rec.Origin
	if err := settled(b.Dir, o); err != nil {
		return false, err
	}
	runs, err := v.machine.Changed() // while it runs: what it changes meanwhile is no matter
	if err != nil {
		return false, err
	}
	last := len(o.Layers) - 1
	top, err := os.Stat(filepath.Join(b.Dir, o.Layers[last]))
	if err != nil {
		return false, err
	}
	if b.Status().State != sandbox.Running || !lean(o, pagesBytes(runs), top.Size()) {
		return false, nil
	}
	o.Layers = o.Layers[:last]
	o.Delta = &pageFile{Name: nextPages(o.Base)}
	if err := writePages(filepath.Join(dir, o.Delta.Name), o.Shape.Memory, nil, v.machine.ReadPages); err != nil {
		return false, err
	}
	if err := supervisor.WriteSynced(filepath.Join(dir, devicesName), nil); err != nil { // they are in the stream
		return false, err
	}
	m := manifest{Format: manifestFormat, Root: rec.Spec.Root, Resources: rec.Resources, Origin: o, Ahead: true}
	return true, r.finish(ctx, b, dir, &m)
}
