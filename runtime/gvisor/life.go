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
	"time"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/runtime/supervisor"
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
	rec := &record{Base: supervisor.Base{Spec: spec.Clone(), Resources: spec.Resources.Or(r.cfg.Defaults)}, Images: imgs}
	return r.boxes.Make(ctx, op, rec, func(b *box) (*sentry, error) {
		s, err := r.launch(ctx, b, state)
		if err != nil {
			return nil, err
		}
		rec.Sentry, rec.Gofer = s.proc, s.gofer
		return s, nil
	})
}

// launch boots a sentry for the box and starts or restores the guest in it. It
// returns nil with an error.
func (r *Runtime) launch(ctx context.Context, b *box, state string) (s *sentry, err error) {
	spec, want := b.Record().Spec, b.Record().shape()
	if err := r.checkFiles(spec, want); err != nil {
		return nil, err
	}
	if len(spec.Mounts) == 0 {
		if s = r.pool.take(want); s != nil {
			if err := unix.Rename(s.dir, b.Dir); err != nil { // os.Rename refuses an empty directory
				go r.pool.discard([]*sentry{s})
				return nil, err
			}
			s.dir = b.Dir
		}
	}
	if s == nil {
		if s, err = r.boot(ctx, b.Dir, spec.ID, want, spec.Mounts); err != nil {
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
		err = errors.Join(err, s.lastWords(), s.End())
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

// awaitGuest asks the guest for its health until it answers.
func (s *sentry) awaitGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.Dial(ctx, sandbox.GuestPort)
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
	return r.boxes.Dial(ctx, "gvisor.Dial", id, port)
}

// dialTimeout bounds one dial, also when the sentry does not answer at all.
const dialTimeout = 10 * time.Second

// Dial opens a connection to a port of the sandbox.
func (s *sentry) Dial(ctx context.Context, port int) (net.Conn, error) {
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
	return r.boxes.Freeze("gvisor.Pause", id, sandbox.Paused, func(s *sentry) error {
		return call(ctx, s.dir, orders.CallPause, nil, nil)
	})
}

// Resume lets a paused sandbox go on.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.boxes.Freeze("gvisor.Resume", id, sandbox.Running, func(s *sentry) error {
		return call(ctx, s.dir, orders.CallResume, nil, nil)
	})
}

// cpus is how many processors the guest sees.
func cpus(limit float64) int {
	n := runtime.NumCPU()
	if limit > 0 {
		n = min(n, max(1, int(limit+0.999)))
	}
	return cmp.Or(n, 1)
}
