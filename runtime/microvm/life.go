package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// LabelStart is the label of a spec that says how its machine comes to be, for
// measuring each way apart; without it the fastest that there is is taken. A
// Create that asks for one that was to be made ahead of need, and is not there,
// fails with Unavailable.
const LabelStart = "microvm.start"

// The values of LabelStart.
const (
	StartCold     = "cold"     // boots its kernel
	StartTemplate = "template" // a new monitor with the template's state
	StartSpawned  = "spawned"  // a monitor that was started ahead of need
	StartPool     = "pool"     // a machine that was started ahead of need
)

// Create makes a sandbox and returns when its guest answers.
func (r *Runtime) Create(ctx context.Context, spec sandbox.Spec) error {
	const op = "microvm.Create"
	if err := r.check(op, spec); err != nil {
		return err
	}
	k, err := r.prepare(ctx)
	if err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	o := origin{Shape: r.shapeOf(spec, spec.Resources.Or(r.cfg.Defaults), k.Digest)}
	return r.make(ctx, op, spec, o, func(b *box) (*vm, error) { return r.fresh(ctx, b, spec) })
}

// check says why a spec cannot become a sandbox here.
func (r *Runtime) check(op string, spec sandbox.Spec) error {
	if err := r.Capabilities().Check(op, spec); err != nil {
		return err
	}
	res := spec.Resources.Or(r.cfg.Defaults)
	if res.Memory < minMemory {
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "%d MiB of memory are too few for a machine; ask for %d MiB or more", res.Memory>>20, minMemory>>20)
	}
	switch spec.Labels[LabelStart] {
	case "", StartCold, StartTemplate, StartSpawned, StartPool:
	default:
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "label %s=%s: cold, template, spawned or pool", LabelStart, spec.Labels[LabelStart])
	}
	switch spec.Labels[LabelMemory] {
	case "", MemoryWhole, MemoryLazy:
	default:
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "label %s=%s: whole or lazy", LabelMemory, spec.Labels[LabelMemory])
	}
	st, err := os.Stat(spec.Root.Path)
	if err != nil {
		return sandbox.E(op, sandbox.NotFound, spec.ID, err).WithHint("the image of the root is gone; build or pull it again")
	}
	if !st.Mode().IsRegular() {
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "%s is not an image", spec.Root.Path)
	}
	if spec.Root.Kind == sandbox.RootDisk {
		return checkDisk(op, spec, res)
	}
	return nil
}

// make makes a sandbox whose machine launch starts, and whose origin that may complete.
func (r *Runtime) make(ctx context.Context, op string, spec sandbox.Spec, o origin, launch func(*box) (*vm, error)) error {
	rec := &record{Base: supervisor.Base{Spec: spec.Clone(), Resources: spec.Resources.Or(r.cfg.Defaults)}, Origin: o}
	return r.boxes.Make(ctx, op, rec, func(b *box) (*vm, error) {
		v, err := launch(b)
		if err == nil {
			err = r.settleIn(ctx, rec, v)
		}
		if err != nil && v != nil {
			return nil, errors.Join(v.explain(err), v.End())
		}
		return v, err
	})
}

// settleIn gives a machine that runs its network, limits and identity.
func (r *Runtime) settleIn(ctx context.Context, rec *record, v *vm) error {
	mtu, err := r.join(v, rec.Spec, rec.Resources)
	if err != nil {
		return err
	}
	v.link = rec.Spec.Link
	if rec.Origin.Shape.PC {
		err = r.settleDisk(ctx, rec, v, mtu)
	} else {
		err = v.identify(ctx, rec.Spec, rec.Resources.Pids, mtu)
	}
	if err != nil {
		return fmt.Errorf("tell the guest who it is: %w", err)
	}
	rec.Process, rec.Tap = v.machine.Process(), v.tap
	if v.paged != nil {
		rec.Pager, rec.PagerGroup = v.paged.Process, v.paged.Group.Name()
	}
	return nil
}

// fresh starts a machine that has nothing of its own yet.
func (r *Runtime) fresh(ctx context.Context, b *box, spec sandbox.Spec) (*vm, error) {
	o, how := b.Record().Origin, spec.Labels[LabelStart]
	if o.Shape.PC {
		return r.freshDisk(ctx, b, spec)
	}
	if how == StartCold {
		o.Layers = []string{layerName(0)}
		b.Record().Origin = o // nobody else knows the box yet
		if err := disk.MakeLayer(filepath.Join(b.Dir, layerName(0)), o.Shape.Disk); err != nil {
			return nil, err
		}
		return r.cold(ctx, b.Dir, spec.ID, spec.Root.Path, o)
	}
	if how != StartTemplate {
		v, have, err := r.pool.take(ctx, o.Shape, spec.Root.Path, b.Dir, how)
		if v != nil || err != nil {
			b.Record().Origin = have
			return v, err
		}
		if how != "" {
			return nil, sandbox.Errorf("take from pool", sandbox.Unavailable, "", "no machine of this kind is ready")
		}
	}
	v, o, err := r.fork(ctx, b.Dir, spec.ID, o.Shape, spec.Root.Path)
	if err != nil {
		return nil, err
	}
	b.Record().Origin = o
	if err := v.load(ctx, o); err != nil {
		return v, err
	}
	return v, nil
}

// fork puts a clone of the shape's template into dir, waiting for its state.
func (r *Runtime) fork(ctx context.Context, dir, groupName string, s shape, root string) (*vm, origin, error) {
	o, err := r.templates.place(ctx, dir, s, root)
	if err != nil {
		return nil, o, err
	}
	if o, err = addLayer(dir, o); err != nil {
		return nil, o, err
	}
	v, err := r.clone(ctx, dir, groupName, root, o)
	return v, o, err
}

// addLayer makes one more layer, for the machine to write.
func addLayer(dir string, o origin) (origin, error) {
	name := nextLayer(o.Layers)
	o.Layers = append(slices.Clone(o.Layers), name)
	return o, disk.MakeLayer(filepath.Join(dir, name), o.Shape.Disk)
}

// nextLayer is a name that no layer has.
func nextLayer(layers []string) string {
	next := 0
	for _, name := range layers {
		var i int
		if _, err := fmt.Sscanf(name, "disk%d.qcow2", &i); err == nil {
			next = max(next, i+1)
		}
	}
	return layerName(next)
}

// Dial opens a connection to a TCP port on the sandbox's loopback. It can close
// each direction by itself.
func (r *Runtime) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	return r.boxes.Dial(ctx, "microvm.Dial", id, port)
}

// Pause freezes the machine in memory.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.boxes.Freeze("microvm.Pause", id, sandbox.Paused, func(v *vm) error { return v.machine.Pause(ctx) })
}

// Resume lets a paused machine go on, with the time that it is now.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.boxes.Freeze("microvm.Resume", id, sandbox.Running, func(v *vm) error {
		if err := v.machine.Resume(ctx); err != nil {
			return err
		}
		if v.bare {
			return nil // nobody is there to be told the time
		}
		if err := v.setClock(ctx); err != nil {
			r.log.Warn("setting the clock of a resumed machine", "sandbox", id, "err", err)
		}
		return nil
	})
}
