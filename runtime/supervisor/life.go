package supervisor

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// minDisk is how much room the directory's file system must have for one more
// sandbox, in bytes. A machine whose disk cannot grow any more dies.
const minDisk = 128 << 20

// Make makes a sandbox whose machine launch starts, completing its record. A
// launch that fails leaves no machine.
func (s *Supervisor[R, M]) Make(ctx context.Context, op string, rec R, launch func(*Box[R, M]) (M, error)) error {
	id := rec.base().Spec.ID
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", id, err)
	}
	rec.base().State = sandbox.Creating
	b, err := s.claim(op, rec)
	if err != nil {
		return sandbox.E(op, "", id, err)
	}
	b.op.Lock()
	defer b.op.Unlock()
	m, err := launch(b)
	if err == nil {
		err = s.begin(b, m)
	}
	if err != nil {
		if ferr := s.forget(b); ferr != nil {
			s.cfg.Log.Error("cannot clear up after a failed create", "sandbox", id, "err", ferr)
		}
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return sandbox.E(op, Kind(err), id, err)
	}
	s.Events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: sandbox.Running})
	return nil
}

// claim reserves an ID and makes its directory.
func (s *Supervisor[R, M]) claim(op string, rec R) (*Box[R, M], error) {
	base := rec.base()
	id := base.Spec.ID
	b := &Box[R, M]{Dir: s.Path(id), rec: rec}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, id, "the runtime is closed")
	}
	if s.boxes[id] != nil {
		return nil, sandbox.Errorf(op, sandbox.Exists, id, "the id is taken")
	}
	if err := s.admit(base.Resources.Memory); err != nil {
		return nil, err
	}
	if err := os.Mkdir(b.Dir, 0o700); errors.Is(err, os.ErrExist) {
		return nil, sandbox.E(op, sandbox.Exists, id, err)
	} else if err != nil {
		return nil, sandbox.E(op, Kind(err), id, err)
	}
	s.boxes[id] = b
	return b, nil
}

// admit says whether there is room for one more sandbox. The caller holds s.mu.
func (s *Supervisor[R, M]) admit(memory int64) error {
	if s.cfg.Admit != nil {
		var promised int64
		for _, b := range s.boxes {
			promised += b.rec.base().Resources.Memory // never changes
		}
		if err := s.cfg.Admit(memory, promised); err != nil {
			return err
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return sandbox.E("find room", sandbox.Internal, s.cfg.Dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < minDisk {
		return sandbox.Errorf("find room", sandbox.Exhausted, "", "only %d MiB are free in %s", free>>20, s.cfg.Dir).
			WithHint("remove sandboxes, snapshots or images, or choose a state directory with more room")
	}
	return nil
}

// begin records a machine that runs and watches over it, or ends it.
func (s *Supervisor[R, M]) begin(b *Box[R, M], m M) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	base := b.rec.base()
	base.State, base.Group = sandbox.Running, m.Group().Name()
	if err := b.save(); err != nil {
		return errors.Join(err, m.End())
	}
	b.machine = m
	s.watch(b, m)
	return nil
}

// forget removes a sandbox's directory and frees its ID.
func (s *Supervisor[R, M]) forget(b *Box[R, M]) error {
	err := os.RemoveAll(b.Dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.boxes, b.rec.base().Spec.ID)
	return err
}

const outOfMemory = "out of memory: the sandbox needed more than its limit and the kernel ended it"

// watch waits in the background for the machine's end and reports it. The caller
// holds b.mu.
func (s *Supervisor[R, M]) watch(b *Box[R, M], m M) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	b.stop, b.ended = cancel, ended
	s.watches.Go(func() {
		defer close(ended)
		defer cancel()
		if err := m.Wait(ctx); err != nil {
			return // let go
		}
		b.mu.Lock()
		if b.gone || b.machine != m {
			b.mu.Unlock()
			return
		}
		starved, reason := m.Group().OutOfMemory() > 0, outOfMemory
		if !starved {
			reason = m.Cause()
		}
		var none M
		base := b.rec.base()
		base.State, base.Reason, b.machine = sandbox.Error, reason, none
		id, err := base.Spec.ID, b.save()
		b.mu.Unlock()
		if err != nil {
			s.cfg.Log.Error("cannot record the end of a sandbox", "sandbox", id, "err", err)
		}
		if starved {
			s.Events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventResource, State: sandbox.Error, Reason: reason})
		}
		s.Events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: sandbox.Error, Reason: reason})
		if err := m.End(); err != nil {
			s.cfg.Log.Error("cannot clear up after a sandbox", "sandbox", id, "err", err)
		}
	})
}

// Dial opens a connection into a sandbox that runs.
func (s *Supervisor[R, M]) Dial(ctx context.Context, op, id string, port int) (net.Conn, error) {
	b, err := s.Find(op, id)
	if err != nil {
		return nil, err
	}
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id, "no port %d", port)
	}
	m, err := b.Live(op, sandbox.Running)
	if err != nil {
		return nil, err
	}
	conn, err := m.Dial(ctx, port)
	if err == nil {
		return conn, nil
	}
	err = b.explain(op, err, sandbox.Running)
	if sandbox.Is(err, sandbox.Internal) {
		return nil, sandbox.E(op, sandbox.Unavailable, id, err)
	}
	return nil, err
}

// explain makes an error of what failed: that the sandbox has ended if that is why.
func (b *Box[R, M]) explain(op string, err error, states ...sandbox.State) error {
	b.settle()
	if _, dead := b.Live(op, states...); dead != nil {
		return dead
	}
	return sandbox.E(op, Kind(err), b.rec.base().Spec.ID, err)
}

// Freeze has do bring a sandbox that runs or is paused into the other state, if it
// is not in it already.
func (s *Supervisor[R, M]) Freeze(op, id string, to sandbox.State, do func(M) error) error {
	b, m, err := s.Hold(op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.Unlock()
	if b.Status().State == to {
		return nil
	}
	if err := do(m); err != nil {
		return b.explain(op, err, sandbox.Running, sandbox.Paused)
	}
	if err := b.Update(func(rec R) { rec.base().State, rec.base().Reason = to, "" }); err != nil {
		return sandbox.E(op, Kind(err), id, err)
	}
	s.Events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: to})
	return nil
}

// Snapshot has write put the sandbox's state into dir, which must be empty and is
// left empty when that fails.
func (s *Supervisor[R, M]) Snapshot(ctx context.Context, op, id, dir string, opts sandbox.SnapshotOptions, write func(*Box[R, M], M) error) error {
	b, m, err := s.Hold(op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.Unlock()
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", id, err)
	}
	if entries, err := os.ReadDir(dir); err != nil {
		return sandbox.E(op, sandbox.Invalid, id, err)
	} else if len(entries) > 0 {
		return sandbox.Errorf(op, sandbox.Invalid, id, "%s is not empty", dir)
	}
	if err := write(b, m); err != nil {
		return b.explain(op, errors.Join(err, clearDir(dir)), sandbox.Running, sandbox.Paused)
	}
	if opts.Stop {
		return s.destroy(op, b)
	}
	return nil
}

// clearDir removes what is in a directory.
func clearDir(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// Destroy removes a sandbox and all that was made for it.
func (s *Supervisor[R, M]) Destroy(op, id string) error {
	b, err := s.Find(op, id)
	if err != nil {
		return nil
	}
	b.op.Lock()
	defer b.op.Unlock()
	return s.destroy(op, b)
}

// destroy does the work of Destroy. The caller holds b.op.
func (s *Supervisor[R, M]) destroy(op string, b *Box[R, M]) error {
	var none M
	b.mu.Lock()
	m, base := b.machine, b.rec.base()
	b.gone = true
	b.mu.Unlock()
	s.mu.Lock()
	known := s.boxes[base.Spec.ID] == b
	s.mu.Unlock()
	if !known {
		return nil // another Destroy was faster
	}
	var err error
	if m != none {
		err = m.End()
	} else if base.Group != "" {
		err = s.Groups.Group(base.Group).Remove()
	}
	if err != nil {
		return sandbox.E(op, "", base.Spec.ID, err)
	}
	b.mu.Lock()
	b.machine = none
	b.mu.Unlock()
	if err := s.forget(b); err != nil {
		return sandbox.E(op, "", base.Spec.ID, err)
	}
	return nil
}

// Kind is the kind of a failure, as far as an error of the kernel tells it.
func Kind(err error) sandbox.Kind {
	for _, none := range []error{unix.ENOSPC, unix.EDQUOT, unix.ENOMEM, unix.EAGAIN, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, none) {
			return sandbox.Exhausted
		}
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return sandbox.Denied
	}
	return sandbox.KindOf(err)
}
