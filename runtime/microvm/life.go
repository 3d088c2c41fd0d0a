package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/disk"
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
	st, err := os.Stat(spec.Root.Path)
	if err != nil {
		return sandbox.E(op, sandbox.NotFound, spec.ID, err).WithHint("the image of the root is gone; build or pull it again")
	}
	if !st.Mode().IsRegular() {
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "%s is not an EROFS image", spec.Root.Path)
	}
	return nil
}

// make makes a sandbox whose machine launch starts, and whose origin that may complete.
func (r *Runtime) make(ctx context.Context, op string, spec sandbox.Spec, o origin, launch func(*box) (*vm, error)) error {
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	rec := record{Spec: spec.Clone(), Resources: spec.Resources.Or(r.cfg.Defaults), State: sandbox.Creating, Origin: o}
	b, err := r.claim(op, rec)
	if err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	b.op.Lock()
	defer b.op.Unlock()
	v, err := launch(b)
	if err == nil {
		err = r.settleIn(ctx, b, v)
	}
	if err != nil {
		if v != nil {
			err = errors.Join(v.explain(err), v.end())
		}
		if ferr := r.forget(b); ferr != nil {
			r.log.Error("cannot clear up after a failed create", "sandbox", spec.ID, "err", ferr)
		}
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return sandbox.E(op, makeKind(err), spec.ID, err)
	}
	r.events.Send(sandbox.Event{Sandbox: spec.ID, Kind: sandbox.EventState, State: sandbox.Running})
	return nil
}

// settleIn gives a machine that runs its network, limits and identity, and records it.
func (r *Runtime) settleIn(ctx context.Context, b *box, v *vm) error {
	mtu, err := r.join(v, b.rec.Spec, b.rec.Resources)
	if err != nil {
		return err
	}
	if err := v.identify(ctx, b.rec.Spec, mtu); err != nil {
		return fmt.Errorf("tell the guest who it is: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.vm, b.rec.State, b.rec.Process, b.rec.Group, b.rec.Tap = v, sandbox.Running, v.machine.Process(), v.group.Name(), v.tap
	if err := b.save(); err != nil {
		b.vm = nil
		return err
	}
	r.watch(b, v)
	return nil
}

// fresh starts a machine that has nothing of its own yet.
func (r *Runtime) fresh(ctx context.Context, b *box, spec sandbox.Spec) (*vm, error) {
	o, how := b.rec.Origin, spec.Labels[LabelStart]
	if how == StartCold {
		o.Layers = []string{layerName(0)}
		b.rec.Origin = o // nobody else knows the box yet
		if err := disk.MakeLayer(filepath.Join(b.dir, layerName(0)), o.Shape.Disk); err != nil {
			return nil, err
		}
		return r.cold(ctx, b.dir, spec.ID, spec.Root.Path, o)
	}
	if how != StartTemplate {
		v, have, err := r.pool.take(ctx, o.Shape, spec.Root.Path, b.dir, how)
		if v != nil || err != nil {
			b.rec.Origin = have
			return v, err
		}
		if how != "" {
			return nil, sandbox.Errorf("take from pool", sandbox.Unavailable, "", "no machine of this kind is ready")
		}
	}
	v, o, err := r.fork(ctx, b.dir, spec.ID, o.Shape, spec.Root.Path)
	if err != nil {
		return nil, err
	}
	b.rec.Origin = o
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

// makeKind is the kind of a failed create or restore.
func makeKind(err error) sandbox.Kind {
	switch {
	case isFull(err), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return sandbox.Exhausted
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return sandbox.Denied
	}
	return sandbox.KindOf(err)
}

// dialTimeout bounds one dial, also when the guest does not answer at all.
const dialTimeout = 10 * time.Second

// Dial opens a connection to a TCP port on the sandbox's loopback. It can close
// each direction by itself.
func (r *Runtime) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	const op = "microvm.Dial"
	b, err := r.box(op, id)
	if err != nil {
		return nil, err
	}
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id, "no port %d", port)
	}
	v, err := b.live(op, sandbox.Running)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := v.dial(ctx, port)
	if err != nil {
		b.settle()
		if _, dead := b.live(op, sandbox.Running); dead != nil {
			return nil, dead
		}
		kind := sandbox.KindOf(err)
		if kind == sandbox.Internal {
			kind = sandbox.Unavailable
		}
		return nil, sandbox.E(op, kind, id, err)
	}
	return conn, nil
}

// Pause freezes the machine in memory.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.freeze(ctx, "microvm.Pause", id, sandbox.Running, sandbox.Paused)
}

// Resume lets a paused machine go on, with the time that it is now.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.freeze(ctx, "microvm.Resume", id, sandbox.Paused, sandbox.Running)
}

func (r *Runtime) freeze(ctx context.Context, op, id string, from, to sandbox.State) error {
	b, err := r.box(op, id)
	if err != nil {
		return err
	}
	b.op.Lock()
	defer b.op.Unlock()
	v, err := b.live(op, from, to)
	if err != nil || b.status().State == to {
		return err
	}
	if to == sandbox.Paused {
		err = v.machine.Pause(ctx)
	} else {
		err = v.machine.Resume(ctx)
	}
	if err != nil {
		b.settle()
		if _, dead := b.live(op, from, to); dead != nil {
			return dead
		}
		return sandbox.E(op, "", id, err)
	}
	if to == sandbox.Running {
		if err := v.setClock(ctx); err != nil {
			r.log.Warn("setting the clock of a resumed machine", "sandbox", id, "err", err)
		}
	}
	if err := b.update(func(rec *record) { rec.State, rec.Reason = to, "" }); err != nil {
		return sandbox.E(op, ioKind(err), id, err)
	}
	r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: to})
	return nil
}

// Destroy removes the sandbox and all that was made for it.
func (r *Runtime) Destroy(_ context.Context, id string) error {
	const op = "microvm.Destroy"
	b, err := r.box(op, id)
	if err != nil {
		return nil
	}
	b.op.Lock()
	defer b.op.Unlock()
	return r.destroy(op, b)
}

// destroy does the work of Destroy. The caller holds b.op.
func (r *Runtime) destroy(op string, b *box) error {
	b.mu.Lock()
	v := b.vm
	b.gone = true
	b.mu.Unlock()
	r.mu.Lock()
	known := r.boxes[b.rec.Spec.ID] == b
	r.mu.Unlock()
	if !known {
		return nil // another Destroy was faster
	}
	var err error
	if v != nil {
		err = v.end()
	} else if b.rec.Group != "" {
		err = r.groups.Group(b.rec.Group).Remove()
	}
	if err != nil {
		return sandbox.E(op, "", b.rec.Spec.ID, err)
	}
	b.mu.Lock()
	b.vm = nil
	b.mu.Unlock()
	if err := r.forget(b); err != nil {
		return sandbox.E(op, "", b.rec.Spec.ID, err)
	}
	return nil
}

// List returns every sandbox, in the order of their IDs.
func (r *Runtime) List(context.Context) ([]sandbox.Status, error) {
	r.mu.Lock()
	boxes := make([]*box, 0, len(r.boxes))
	for _, b := range r.boxes {
		boxes = append(boxes, b)
	}
	r.mu.Unlock()
	out := make([]sandbox.Status, len(boxes))
	for i, b := range boxes {
		b.settle()
		out[i] = b.status()
	}
	slices.SortFunc(out, func(a, b sandbox.Status) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}
