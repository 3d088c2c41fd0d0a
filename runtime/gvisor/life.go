package gvisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/sandbox"
	"golang.org/x/sys/unix"
)

// healthTimeout bounds how long a guest may take to answer after its start.
const healthTimeout = 30 * time.Second

// Create makes a sandbox and returns when its guest answers.
func (r *Runtime) Create(ctx context.Context, spec sandbox.Spec) error {
	const op = "gvisor.Create"
	if err := r.check(op, spec); err != nil {
		return err
	}
	imgs := images{Agent: filepath.Base(r.agent)}
	if spec.Root.Kind == sandbox.RootHost {
		imgs.Host = filepath.Base(r.host.image)
	}
	return r.make(ctx, op, spec, "", imgs)
}

// check says why a spec cannot become a sandbox here.
func (r *Runtime) check(op string, spec sandbox.Spec) error {
	if err := r.Capabilities().Check(op, spec); err != nil {
		return err
	}
	return checkSpec(op, spec)
}

// make creates a sandbox, or restores it when state is the directory of a snapshot.
func (r *Runtime) make(ctx context.Context, op string, spec sandbox.Spec, state string, imgs images) error {
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	rec := record{
		Spec: spec.Clone(), Resources: spec.Resources.Or(r.cfg.Defaults), State: sandbox.Creating, Images: imgs,
	}
	b, err := r.claim(op, rec)
	if err != nil {
		return err
	}
	b.op.Lock()
	defer b.op.Unlock()
	s, err := r.launch(ctx, b, state)
	if err == nil {
		b.mu.Lock()
		b.sentry, b.rec.State, b.rec.Sentry, b.rec.Gofer, b.rec.Group = s, sandbox.Running, s.proc, s.gofer, s.group.Name()
		if err = b.save(); err == nil {
			r.watch(b, s)
		}
		b.mu.Unlock()
	}
	if err != nil {
		if s != nil {
			err = errors.Join(err, s.end())
		}
		if ferr := r.forget(b); ferr != nil {
			r.log.Error("cannot clear up after a failed create", "sandbox", spec.ID, "err", ferr)
		}
		return sandbox.E(op, makeKind(err), spec.ID, err)
	}
	r.events.Send(sandbox.Event{Sandbox: spec.ID, Kind: sandbox.EventState, State: sandbox.Running})
	return nil
}

// launch boots a sentry for the box and starts or restores the guest in it. It
// returns nil with an error.
func (r *Runtime) launch(ctx context.Context, b *box, state string) (s *sentry, err error) {
	spec, want := b.rec.Spec, b.rec.shape()
	if err := r.checkFiles(spec, want); err != nil {
		return nil, err
	}
	if err := r.checkDisk(); err != nil {
		return nil, err
	}
	if len(spec.Mounts) == 0 {
		if s = r.pool.take(want); s != nil {
			if err := unix.Rename(s.dir, b.dir); err != nil { // os.Rename refuses an empty directory
				go r.pool.discard([]*sentry{s})
				return nil, err
			}
			s.dir = b.dir
		}
	}
	if s == nil {
		if s, err = r.boot(ctx, b.dir, spec.ID, want, spec.Mounts); err != nil {
			return nil, fmt.Errorf("boot the sentry: %w", err)
		}
	}
	if state == "" {
		err = s.begin(ctx, spec.Link)
	} else {
		err = s.restore(ctx, spec.Link, state)
	}
	if err == nil {
		err = s.awaitGuest(ctx)
	}
	if err == nil {
		err = s.identify(ctx, spec, state == "")
	}
	if err != nil {
		if s.group.OutOfMemory() > 0 {
			err = sandbox.Errorf("start guest", sandbox.Exhausted, "", "out of memory: %d bytes are too few: %w", want.res.Memory, err)
		}
		err = errors.Join(err, s.lastWords(), s.end())
		return nil, err
	}
	return s, nil
}

// files finds what a shape is made of.
func (r *Runtime) files(want shape) files {
	f := files{root: want.root, agent: filepath.Join(r.images(), want.images.Agent)}
	if want.images.Host != "" {
		f.root, f.binds = filepath.Join(r.images(), want.images.Host), r.host.binds
	}
	return f
}

// checkFiles says what is missing on the host.
func (r *Runtime) checkFiles(spec sandbox.Spec, want shape) error {
	root := r.files(want).root
	st, err := os.Stat(root)
	if err != nil {
		return sandbox.E("find root", sandbox.NotFound, "", err).WithHint("the image of the root is gone; build or pull it again")
	}
	if !st.Mode().IsRegular() {
		return sandbox.Errorf("find root", sandbox.Invalid, "", "%s is not an EROFS image", root)
	}
	for _, m := range spec.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			return sandbox.E("find mount", sandbox.NotFound, "", err)
		}
	}
	return nil
}

// minDisk is how much room the state directory's file system must have for one
// more sandbox, in bytes. A sentry whose overlay cannot grow any more dies.
const minDisk = 128 << 20

func (r *Runtime) checkDisk() error {
	var st unix.Statfs_t
	if err := unix.Statfs(r.cfg.Dir, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < minDisk {
		return sandbox.Errorf("find room", sandbox.Exhausted, "", "only %d MiB are free in %s", free>>20, r.cfg.Dir).
			WithHint("remove sandboxes, snapshots or images, or choose a state directory with more room")
	}
	return nil
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

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// awaitGuest asks the guest for its health until it answers.
func (s *sentry) awaitGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.dial(ctx, sandbox.GuestPort)
		},
	}}
	pause := time.Millisecond
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://guest/health", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode/100 == 2 {
				return nil
			}
			err = fmt.Errorf("the guest answered %s", resp.Status)
		}
		if dead := s.proc.Dead(); dead {
			return fmt.Errorf("the sandbox ended before its guest answered: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the guest does not answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(pause):
		}
		pause = min(2*pause, 50*time.Millisecond)
	}
}

// Dial opens a connection to a TCP port on the sandbox's loopback. It is a
// *net.UnixConn: each direction can be closed by itself.
func (r *Runtime) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	const op = "gvisor.Dial"
	b, err := r.box(op, id)
	if err != nil {
		return nil, err
	}
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id, "no port %d", port)
	}
	s, err := b.live(op, sandbox.Running)
	if err != nil {
		return nil, err
	}
	conn, err := s.dial(ctx, port)
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

// dialTimeout bounds one dial, also when the sentry does not answer at all.
const dialTimeout = 10 * time.Second

func (s *sentry) dial(ctx context.Context, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close() // FileConn takes a descriptor of its own
	defer theirs.Close()
	if err := unix.SetNonblock(int(theirs.Fd()), true); err != nil {
		return nil, err
	}
	if err := s.connect(ctx, port, theirs); err != nil {
		return nil, fmt.Errorf("connect to port %d: %w", port, err)
	}
	return net.FileConn(ours)
}

// Pause freezes the sandbox in memory.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.freeze(ctx, "gvisor.Pause", id, orders.CallPause, sandbox.Running, sandbox.Paused)
}

// Resume lets a paused sandbox go on.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.freeze(ctx, "gvisor.Resume", id, orders.CallResume, sandbox.Paused, sandbox.Running)
}

func (r *Runtime) freeze(ctx context.Context, op, id, method string, from, to sandbox.State) error {
	b, err := r.box(op, id)
	if err != nil {
		return err
	}
	b.op.Lock()
	defer b.op.Unlock()
	s, err := b.live(op, from, to)
	if err != nil || b.status().State == to {
		return err
	}
	if err := call(ctx, s.dir, method, nil, nil); err != nil {
		return sandbox.E(op, "", id, err)
	}
	if err := b.setState(to, ""); err != nil {
		return sandbox.E(op, ioKind(err), id, err)
	}
	r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: to})
	return nil
}

// Destroy removes the sandbox and all that was made for it.
func (r *Runtime) Destroy(_ context.Context, id string) error {
	const op = "gvisor.Destroy"
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
	s := b.sentry
	b.gone = true
	b.mu.Unlock()
	r.mu.Lock()
	known := r.boxes[b.rec.Spec.ID] == b
	r.mu.Unlock()
	if !known {
		return nil // another Destroy was faster
	}
	var err error
	if s != nil {
		err = s.end()
	} else {
		err = r.groups.Group(b.rec.Group).Remove()
	}
	if err != nil {
		return sandbox.E(op, "", b.rec.Spec.ID, err)
	}
	b.mu.Lock()
	b.sentry = nil
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

// cpus is how many processors the guest sees.
func cpus(limit float64) int {
	n := runtime.NumCPU()
	if limit > 0 {
		n = min(n, max(1, int(limit+0.999)))
	}
	return cmp.Or(n, 1)
}
