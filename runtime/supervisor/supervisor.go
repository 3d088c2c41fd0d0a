// Package supervisor keeps the sandboxes of a runtime in a directory that one
// process owns, with a record for each, and watches over the processes that they
// are.
//
// Those processes go on when their supervisor ends, and the next one on the same
// directory adopts them:
//
//	DIR/lock               held by the one Supervisor that owns the directory
//	DIR/s/<id>/            one sandbox: record.json, and what its runtime puts there
package supervisor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/feed"
	"github.com/atoll-run/atoll/sandbox"
)

// Machine is what runs one sandbox: a process of the host, with all that was made
// for it.
type Machine interface {
	comparable
	// Wait returns nil once the machine has ended. When ctx ends first it lets go
	// of the machine, which goes on, and returns an error.
	Wait(ctx context.Context) error
	// Ending reports whether the machine has ended or is about to.
	Ending() bool
	// Cause says in a sentence why a machine that has ended did.
	Cause() string
	// Group holds the machine's processes.
	Group() *cgroup.Group
	// Dial opens a connection to a TCP port on the sandbox's loopback.
	Dial(ctx context.Context, port int) (net.Conn, error)
	// End ends the machine and removes its group, and what else it has outside the
	// sandbox's directory.
	End() error
}

// Config says what a Supervisor keeps.
type Config struct {
	Name   string // of the runtime, with which the names of operations begin
	Dir    string // absolute; made if it is missing
	Prefix string // names the control group under which those of all sandboxes lie
	// Admit says why there is no room for a sandbox with so much memory beside
	// those that may have promised bytes together; nil admits all.
	Admit func(memory, promised int64) error
	Log   *slog.Logger
}

// Supervisor keeps sandboxes of which R is recorded and that machines M run. Its
// methods may be called from many goroutines.
type Supervisor[R Record, M Machine] struct {
	Groups *cgroup.Parent
	Events *feed.Feed

	cfg  Config
	lock *os.File

	mu      sync.Mutex
	boxes   map[string]*Box[R, M] // by ID; includes those being made
	closed  bool
	watches sync.WaitGroup // goroutines that wait for machines to end
}

// Open takes the directory. It fails with Conflict when another process owns it,
// and with Denied where there can be no control groups.
func Open[R Record, M Machine](cfg Config) (*Supervisor[R, M], error) {
	op := cfg.Name + ".New"
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "s"), 0o700); err != nil {
		return nil, sandbox.E(op, Kind(err), cfg.Dir, err)
	}
	lock, err := Lock(cfg.Dir)
	if err != nil {
		return nil, sandbox.E(op, "", "", err)
	}
	groups, err := cgroup.Open(cfg.Prefix)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &Supervisor[R, M]{Groups: groups, Events: new(feed.Feed), cfg: cfg, lock: lock, boxes: make(map[string]*Box[R, M])}, nil
}

// Lock takes a directory for this process, until the file is closed or the
// process ends. It fails with Conflict when another has it.
func Lock(dir string) (*os.File, error) {
	const op = "lock"
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, sandbox.E(op, Kind(err), dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, sandbox.Errorf(op, sandbox.Conflict, dir, "another process owns this directory").
				WithHint("stop it, or choose another state directory")
		}
		return nil, sandbox.E(op, sandbox.Internal, dir, err)
	}
	return f, nil
}

// Shut makes no more sandboxes. It returns false when that was so already.
func (s *Supervisor[R, M]) Shut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.closed
	s.closed = true
	return !was
}

// Close lets all machines go without ending them, and gives up the directory.
func (s *Supervisor[R, M]) Close() error {
	s.Shut()
	for _, b := range s.All() {
		b.detach()
	}
	s.watches.Wait()
	s.Events.Close()
	s.Groups.Close()
	return s.lock.Close()
}

// Path is the directory of a sandbox, or of what may become one: those whose
// names are no ID are removed when the directory is adopted.
func (s *Supervisor[R, M]) Path(name string) string { return filepath.Join(s.cfg.Dir, "s", name) }

// All returns all sandboxes, in no order.
func (s *Supervisor[R, M]) All() []*Box[R, M] {
	s.mu.Lock()
	defer s.mu.Unlock()
	boxes := make([]*Box[R, M], 0, len(s.boxes))
	for _, b := range s.boxes {
		boxes = append(boxes, b)
	}
	return boxes
}

// List returns what there is to know of every sandbox, in the order of their IDs.
func (s *Supervisor[R, M]) List() []sandbox.Status {
	boxes := s.All()
	out := make([]sandbox.Status, len(boxes))
	for i, b := range boxes {
		b.settle()
		out[i] = b.Status()
	}
	slices.SortFunc(out, func(a, b sandbox.Status) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// Find finds a sandbox. It fails with NotFound.
func (s *Supervisor[R, M]) Find(op, id string) (*Box[R, M], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.boxes[id]; b != nil {
		return b, nil
	}
	return nil, sandbox.Errorf(op, sandbox.NotFound, id, "no such sandbox")
}

// Hold finds a sandbox that is in one of the states and locks it for the caller,
// who must unlock it.
func (s *Supervisor[R, M]) Hold(op, id string, states ...sandbox.State) (b *Box[R, M], m M, err error) {
	if b, err = s.Find(op, id); err != nil {
		return nil, m, err
	}
	b.op.Lock()
	if m, err = b.Live(op, states...); err != nil {
		b.op.Unlock()
		return nil, m, err
	}
	return b, m, nil
}

// Adopt takes over what an earlier process left: machines that take gets hold of
// go on, sandboxes that ended are kept as lost, and those half made are removed.
func (s *Supervisor[R, M]) Adopt(take func(*Box[R, M]) (M, error)) error {
	op := s.cfg.Name + ".New"
	dirs, err := os.ReadDir(s.Path(""))
	if err != nil {
		return sandbox.E(op, sandbox.Internal, s.cfg.Dir, err)
	}
	known := make(map[string]bool)
	for _, d := range dirs {
		b := &Box[R, M]{Dir: s.Path(d.Name())}
		if err := b.load(d.Name()); err != nil {
			s.cfg.Log.Warn("removing a sandbox that was never complete", "sandbox", d.Name(), "err", err)
			if err := errors.Join(s.Groups.Group(d.Name()).Remove(), os.RemoveAll(b.Dir)); err != nil {
				return sandbox.E(op, "", d.Name(), err)
			}
			continue
		}
		known[b.rec.base().Group] = true
		s.boxes[d.Name()] = b
		if b.rec.base().State != sandbox.Error {
			s.takeOver(b, take)
		}
	}
	for _, name := range s.Groups.List() {
		if !known[name] {
			s.cfg.Log.Warn("removing a control group without a sandbox", "group", name)
			if err := s.Groups.Group(name).Remove(); err != nil {
				return sandbox.E(op, "", name, err)
			}
		}
	}
	return nil
}

// takeOver takes hold of an adopted sandbox's machine, or declares it lost.
func (s *Supervisor[R, M]) takeOver(b *Box[R, M], take func(*Box[R, M]) (M, error)) {
	m, err := take(b)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		b.machine = m
		s.watch(b, m)
		return
	}
	base := b.rec.base()
	s.cfg.Log.Warn("a sandbox was lost", "sandbox", base.Spec.ID, "err", err)
	group := s.Groups.Group(base.Group)
	base.State, base.Reason = sandbox.Error, "it ended while nobody watched"
	if group.OutOfMemory() > 0 {
		base.Reason = outOfMemory
	}
	if err := errors.Join(b.save(), group.Remove()); err != nil {
		s.cfg.Log.Error("cannot clear up after a lost sandbox", "sandbox", base.Spec.ID, "err", err)
	}
}
