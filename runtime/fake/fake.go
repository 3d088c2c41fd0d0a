// Package fake makes sandboxes out of plain processes, for tests of the layers
// above: nothing isolates them, but everything else is real.
//
// Each sandbox is an agent of its own with a directory as its home, so commands,
// files and ports work as they do elsewhere. Roots, networks and resources of a
// spec are accepted and not looked at. Paths are the host's; tests use relative
// ones, which start in the home, and leave the default working directory of the
// guest's /init empty.
//
// The sandboxes live in a World, which survives the Runtime as a machine
// survives a daemon. A World can also inject faults, see Fault and Chaos.
package fake

import (
	"context"
	"io"
	"net"
	"slices"

	"github.com/atoll-run/atoll/sandbox"
)

// Name is what a fake runtime is called unless its Config says otherwise.
const Name = "fake"

// Capabilities is what a fake runtime can do. Its Isolation is empty: there is none.
func Capabilities() sandbox.Capabilities {
	return sandbox.Capabilities{
		Roots:      []sandbox.RootKind{sandbox.RootEROFS, sandbox.RootHost, sandbox.RootRepository},
		Networks:   []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkSandbox, sandbox.NetworkHost},
		Pause:      true,
		Snapshot:   true,
		Live:       true,
		Changes:    true,
		Persistent: true,
	}
}

// Config says what a Runtime pretends to be.
type Config struct {
	Name         string                // default: Name
	Capabilities *sandbox.Capabilities // default: Capabilities(); what is taken away is refused, what is added is accepted and ignored
}

// Runtime is a handle on a World. It keeps nothing of its own.
type Runtime struct {
	world *World
	name  string
	caps  sandbox.Capabilities
	ctx   context.Context // ends with Close
	stop  context.CancelFunc
}

var _ sandbox.Runtime = (*Runtime)(nil)

// Open returns a Runtime that shows the world's sandboxes.
func (w *World) Open(cfg Config) *Runtime {
	r := &Runtime{world: w, name: cfg.Name, caps: Capabilities()}
	if r.name == "" {
		r.name = Name
	}
	if cfg.Capabilities != nil {
		r.caps = *cfg.Capabilities
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r
}

// Name implements sandbox.Runtime.
func (r *Runtime) Name() string { return r.name }

// Capabilities implements sandbox.Runtime.
func (r *Runtime) Capabilities() sandbox.Capabilities { return r.caps }

// Create implements sandbox.Runtime.
func (r *Runtime) Create(ctx context.Context, spec sandbox.Spec) error {
	return r.make(ctx, "Create", spec, "")
}

// Restore implements sandbox.Runtime. Files come back, processes do not.
func (r *Runtime) Restore(ctx context.Context, spec sandbox.Spec, dir string) error {
	if err := r.can("Restore", r.caps.Snapshot); err != nil {
		return err
	}
	return r.make(ctx, "Restore", spec, dir)
}

// make starts a sandbox, with the files of the snapshot in dir unless it is empty.
func (r *Runtime) make(ctx context.Context, op string, spec sandbox.Spec, dir string) error {
	if err := r.caps.Check(r.op(op), spec); err != nil {
		return err
	}
	if _, err := r.world.faults.meet(ctx, r.op(op), op, spec.ID); err != nil {
		return err
	}
	b, err := r.world.add(r.op(op), spec)
	if err != nil {
		return err
	}
	defer b.unlock()
	if err := b.start(ctx, r.op(op), dir); err != nil {
		r.world.remove(b)
		return err
	}
	return nil
}

// Dial implements sandbox.Runtime. A port that World.Serve registered leads to
// its handler, every other one to the host's loopback.
func (r *Runtime) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	op := r.op("Dial")
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id, "no such port: %d", port)
	}
	cut, err := r.world.faults.meet(ctx, op, "Dial", id)
	if err != nil {
		return nil, err
	}
	b, err := r.world.lock(ctx, op, id)
	if err != nil {
		return nil, err
	}
	defer b.unlock()
	if err := b.want(op, sandbox.Running); err != nil {
		return nil, err
	}
	conn, err := b.dial(ctx, port)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unavailable, id, err)
	}
	if cut > 0 {
		conn = &cutConn{Conn: conn, left: cut}
	}
	return conn, nil
}

// Pause implements sandbox.Runtime.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.freeze(ctx, "Pause", id, sandbox.Paused)
}

// Resume implements sandbox.Runtime.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.freeze(ctx, "Resume", id, sandbox.Running)
}

func (r *Runtime) freeze(ctx context.Context, op, id string, to sandbox.State) error {
	if err := r.can(op, r.caps.Pause); err != nil {
		return err
	}
	return r.with(ctx, op, id, func(op string, b *box) error {
		if err := b.want(op, sandbox.Running, sandbox.Paused); err != nil {
			return err
		}
		return b.freeze(op, to)
	})
}

// Snapshot implements sandbox.Runtime. It holds the sandbox's files.
func (r *Runtime) Snapshot(ctx context.Context, id, dir string, opts sandbox.SnapshotOptions) error {
	if err := r.can("Snapshot", r.caps.Snapshot); err != nil {
		return err
	}
	return r.with(ctx, "Snapshot", id, func(op string, b *box) error {
		if err := b.want(op, sandbox.Running, sandbox.Paused); err != nil {
			return err
		}
		if err := b.snapshot(ctx, op, dir); err != nil {
			return err
		}
		if opts.Stop {
			r.world.remove(b)
		}
		return nil
	})
}

// Changes implements sandbox.Runtime. The names in it are those in the home.
func (r *Runtime) Changes(ctx context.Context, id string, w io.Writer) error {
	if err := r.can("Changes", r.caps.Changes); err != nil {
		return err
	}
	return r.with(ctx, "Changes", id, func(op string, b *box) error {
		return b.changes(ctx, op, w)
	})
}

// Stats implements sandbox.Runtime.
func (r *Runtime) Stats(ctx context.Context, id string) (stats sandbox.Stats, err error) {
	err = r.with(ctx, "Stats", id, func(op string, b *box) error {
		if err := b.want(op, sandbox.Running, sandbox.Paused); err != nil {
			return err
		}
		stats, err = b.stats(op)
		return err
	})
	return stats, err
}

// Destroy implements sandbox.Runtime.
func (r *Runtime) Destroy(ctx context.Context, id string) error {
	err := r.with(ctx, "Destroy", id, func(_ string, b *box) error {
		r.world.remove(b)
		return nil
	})
	if sandbox.Is(err, sandbox.NotFound) && !r.world.known(id) {
		return nil
	}
	return err
}

// List implements sandbox.Runtime.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Status, error) {
	if _, err := r.world.faults.meet(ctx, r.op("List"), "List", ""); err != nil {
		return nil, err
	}
	return r.world.list(), nil
}

// Watch implements sandbox.Runtime.
func (r *Runtime) Watch(ctx context.Context) <-chan sandbox.Event {
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(r.ctx, cancel)
	return r.world.feed.Watch(ctx)
}

// Close implements sandbox.Runtime. It ends the watches of this handle.
func (r *Runtime) Close() error {
	r.stop()
	return nil
}

// with calls f on a sandbox that nobody else works on meanwhile, after the
// faults that lie in wait for the call.
func (r *Runtime) with(ctx context.Context, op, id string, f func(op string, b *box) error) error {
	full := r.op(op)
	if _, err := r.world.faults.meet(ctx, full, op, id); err != nil {
		return err
	}
	b, err := r.world.lock(ctx, full, id)
	if err != nil {
		return err
	}
	defer b.unlock()
	return f(full, b)
}

func (r *Runtime) op(method string) string { return r.name + "." + method }

func (r *Runtime) can(op string, able bool) error {
	if !able {
		return sandbox.E(r.op(op), sandbox.Unsupported, "", nil)
	}
	return nil
}

// want fails with Conflict unless the sandbox is in one of the states.
func (b *box) want(op string, states ...sandbox.State) error {
	if st := b.state(); !slices.Contains(states, st) {
		return sandbox.Errorf(op, sandbox.Conflict, b.spec.ID, "the sandbox is in the state %q", st)
	}
	return nil
}
