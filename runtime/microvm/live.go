package microvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm/move"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// Send sends the machine to one that Receives, relative to a snapshot that both have: its memory is what pages are compared
// with, and its disk's layers stand under the one that is sent.
func (r *Runtime) Send(ctx context.Context, id, dir string, w io.Writer) (stopped time.Time, err error) {
	const op = "microvm.Send"
	b, v, err := r.boxes.Hold(op, id, sandbox.Running)
	if err != nil {
		return stopped, err
	}
	defer b.Unlock()
	m, err := readManifest(dir)
	if err != nil {
		return stopped, sandbox.E(op, sandbox.Invalid, id, err)
	}
	layers := b.Record().Origin.Layers
	if last := len(layers) - 1; !slices.Equal(layers[:last], m.Origin.Layers) {
		return stopped, sandbox.Errorf(op, sandbox.Unsupported, id, "its disk has got another layer since the snapshot")
	}
	base, drop, err := r.moveBase(dir, b.Record().Spec.Root, place(m.Origin))
	if err != nil {
		return stopped, sandbox.E(op, supervisor.Kind(err), id, err)
	}
	defer drop()
	ctx, alive := v.whileAlive(ctx)
	defer alive()
	stats, stopped, err := move.Out(ctx, v.machine, filepath.Join(b.Dir, layers[len(layers)-1]), base, w)
	r.step("machine sent")
	if err == nil {
		// A later process must not let it go on.
		if err = b.Update(func(rec *record) { rec.State = sandbox.Paused }); err != nil {
			err = errors.Join(err, v.machine.Stay(context.WithoutCancel(ctx)))
		}
	}
	if err != nil {
		return stopped, sandbox.E(op, supervisor.Kind(err), id, v.explain(err))
	}
	r.log.Info("sent a machine", "sandbox", id, "pages", stats.Pages, "equal", stats.Equal, "found", stats.Found, "changed", stats.Changed, "blocks", stats.Blocks, "bytes", stats.Wire)
	r.step("machine on record as sent")
	return stopped, nil
}

// moveBase is the memory that an origin, whose files are in dir, describes, and the root that the machine reads. drop ends its use.
func (r *Runtime) moveBase(dir string, root sandbox.Root, o origin) (base move.Base, drop func(), err error) {
	memory, err := r.memories.get(dir, o.Base, o.Shape.Memory)
	if err != nil {
		return base, nil, err
	}
	defer memory.Close() // what is mapped stays
	named := memoryKey(o.Base) + root.Digest
	if o.Delta != nil {
		named += o.Delta.Digest
		base.Over = make(map[uint32][]byte, o.Delta.Bytes/vmm.PageSize)
		err := o.Delta.readPages(dir, o.Shape.Memory, func(buf []byte, first uint32) error {
			kept := slices.Clone(buf)
			for i := 0; i < len(kept); i += vmm.PageSize {
				base.Over[first+uint32(i/vmm.PageSize)] = kept[i : i+vmm.PageSize]
			}
			return nil
		})
		if err != nil {
			return base, nil, err
		}
	}
	base.Digest = digestOfBytes([]byte(named))
	image, err := os.Open(root.Path)
	if err != nil {
		return base, nil, err
	}
	memoryMap, unmap, err := mapMemory(memory, o.Shape.Memory)
	if err != nil {
		return base, nil, errors.Join(err, image.Close())
	}
	base.Memory, base.Image = memoryMap, image
	return base, func() { unmap(); image.Close() }, nil
}

// Receive makes a machine of a snapshot and what another runtime Sends.
func (r *Runtime) Receive(ctx context.Context, spec sandbox.Spec, dir string, in io.ReadCloser, start func(run func() error) error) error {
	const op = "microvm.Receive"
	defer in.Close()
	m, err := r.restorable(ctx, op, spec, dir)
	if err != nil {
		return err
	}
	return r.make(ctx, op, spec, m.Origin, func(b *box) (*vm, error) { return r.takeIn(ctx, b, spec, m, dir, in, start) })
}

// takeIn starts a machine with what is sent. It returns when the machine runs.
func (r *Runtime) takeIn(ctx context.Context, b *box, spec sandbox.Spec, m manifest, from string, in io.ReadCloser, start func(func() error) error) (*vm, error) {
	o, err := r.furnish(b, m, from)
	if err != nil {
		return nil, err
	}
	base, drop, err := r.moveBase(b.Dir, spec.Root, o)
	if errors.Is(err, errDamaged) {
		return nil, sandbox.E("read snapshot", sandbox.Invalid, "", err)
	}
	if err != nil {
		return nil, err
	}
	defer drop()
	v, err := r.clone(ctx, b.Dir, spec.ID, spec.Root.Path, o)
	if err != nil {
		return nil, err
	}
	r.step("monitor waits for a machine")
	if o.Delta != nil {
		if err := o.Delta.readPages(b.Dir, o.Shape.Memory, v.machine.WritePages); err != nil {
			return v, err
		}
	}
	if _, err := move.In(ctx, v.machine, filepath.Join(b.Dir, o.Layers[len(o.Layers)-1]), base, in); err != nil {
		return v, err
	}
	r.step("machine received")
	if err := start(func() error { return v.machine.Resume(ctx) }); err != nil {
		return v, err
	}
	r.step("machine runs")
	if _, err := v.reach(ctx); err != nil {
		return v, fmt.Errorf("the machine does not answer where it has arrived: %w", err)
	}
	return v, r.dropDelta(b)
}

// dropDelta notes that the changes of a snapshot are in the machine's own memory now.
func (r *Runtime) dropDelta(b *box) error {
	delta := b.Record().Origin.Delta
	b.Record().Origin.Delta = nil // nobody else knows the box yet
	if delta == nil {
		return nil
	}
	return os.Remove(filepath.Join(b.Dir, delta.Name))
}
