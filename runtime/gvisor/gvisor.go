// Package gvisor runs sandboxes on gVisor, a kernel in user space that is
// shipped inside our own binary.
//
// Every sandbox is one process, the sentry (see the package of that name), which
// answers all system calls of the sandbox, holds its memory and its network
// stack, and is steered over a control socket in the sandbox's directory. A
// sandbox whose files all come from EROFS images needs nothing else; one that
// sees host directories has a second process beside it, the gofer, which alone
// can open them.
//
// Sentries do not depend on the process that started them. What is needed to
// find them again is in Config.Dir:
//
//	lock             held by the one Runtime that owns the directory
//	images/          EROFS images of ours, named by their content: guest agents, host roots
//	s/<id>/          one directory a sandbox: record.json, config.json, control socket, overlay
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// Name is the word by which users choose this runtime.
const Name = "gvisor"

// Config says where and how a Runtime keeps its sandboxes.
type Config struct {
	// Dir holds all state. It is made if it is missing. One Runtime at a time may own it.
	Dir string
	// Guest is the host path of the static guest agent.
	Guest string
	// Prefix names the control group under which all sandboxes of this runtime
	// lie; empty means a name derived from Dir. No two directories may share one.
	Prefix string
	// Executable is started as sentry and gofer: a program that calls sentry.Main
	// first thing. Empty means this process's own.
	Executable string
	// Prewarm is how many sentries are kept booted for the root and resources
	// used last; each costs about 25 MB until it is used. 0 keeps none.
	Prewarm int
	// Defaults fills the zero fields of a spec's Resources. Its own zero fields
	// mean: 1 GiB of memory, 10 GiB of disk, 4096 processes, no limit of CPUs.
	Defaults sandbox.Resources
	// Log receives what happens; nil discards it.
	Log *slog.Logger
	// Debug is a directory for the sentries' own logs, which are large and slow;
	// empty means none.
	Debug string
}

// Runtime is the gVisor runtime. Its methods may be called from many goroutines.
type Runtime struct {
	cfg     Config
	log     *slog.Logger
	program *os.File // what sentries and gofers execute
	boxes   *boxes
	agent   string // EROFS image of the guest agent
	host    hostRoot
	digests digests // of images
	pool    *pool
	stop    chan struct{}  // closed by Close
	watches sync.WaitGroup // watchMemory
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New opens the runtime at cfg.Dir, adopts the sandboxes that an earlier process
// left running there and removes what it left half made. It fails with Denied
// where the host does not allow what gVisor needs, and Conflict when another
// process owns the directory.
func New(cfg Config) (*Runtime, error) {
	const op = "gvisor.New"
	if err := checkHost(); err != nil {
		return nil, err
	}
	var err error
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, cfg.Dir, err)
	}
	if cfg.Prefix == "" {
		cfg.Prefix = prefix(cfg.Dir)
	}
	if cfg.Executable == "" {
		cfg.Executable = "/proc/self/exe"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Defaults = cfg.Defaults.Or(sandbox.Resources{Memory: 1 << 30, Disk: 10 << 30, Pids: 4096})
	r := &Runtime{cfg: cfg, log: cfg.Log, stop: make(chan struct{})}
	r.boxes, err = supervisor.Open[*record, *sentry](supervisor.Config{Name: Name, Dir: cfg.Dir, Prefix: cfg.Prefix, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	r.program, err = openProgram(cfg.Executable)
	if err == nil {
		err = r.open()
	}
	if err != nil {
		_ = r.program.Close() // nil says so and does nothing
		return nil, errors.Join(err, r.boxes.Close())
	}
	return r, nil
}

// programFD is the least descriptor of the sentries' program: above all that a
// sentry is given, which lie where they did not when it is executed.
const programFD = 512

// openProgram opens the program that sentries execute by its descriptor: they are
// nobody, whom the directories that lead to it may keep out.
func openProgram(path string) (*os.File, error) {
	const op = "gvisor.New"
	f, err := os.Open(path)
	if err != nil {
		return nil, sandbox.E(op, "", path, err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, programFD)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Exhausted, path, err).WithHint("raise the limit of open files")
	}
	return os.NewFile(uintptr(fd), path), nil
}

// executable is the path by which a process that has just been forked from this
// one finds the sentries' program.
func (r *Runtime) executable() string { return fmt.Sprintf("/proc/self/fd/%d", r.program.Fd()) }

// prefix is the default name of the parent control group.
func prefix(dir string) string {
	sum := blake3.Sum256([]byte(dir))
	return fmt.Sprintf("atoll-%x", sum[:5])
}

// open does the part of New that needs the directory's lock.
func (r *Runtime) open() error {
	const op = "gvisor.New"
	var err error
	if r.agent, err = makeAgentImage(r.images(), r.cfg.Guest); err != nil {
		return sandbox.E(op, "", r.cfg.Guest, err)
	}
	if r.host, err = makeHostRoot(r.images()); err != nil {
		return sandbox.E(op, "", "", err)
	}
	if err := r.boxes.Adopt(r.takeOver); err != nil {
		return err
	}
	r.pool = newPool(r, r.cfg.Prewarm)
	r.watches.Go(func() { r.watchMemory(r.stop) })
	return nil
}

// images is the directory of the images that we make ourselves.
func (r *Runtime) images() string { return filepath.Join(r.cfg.Dir, "images") }

// checkHost says whether this process may make sandboxes at all.
func checkHost() error {
	const op = "gvisor.New"
	if os.Geteuid() != 0 {
		return sandbox.Errorf(op, sandbox.Denied, "",
			"gVisor needs root for control groups and network namespaces, and this process runs as uid %d", os.Geteuid()).
			WithHint("run it with sudo or as a system service")
	}
	return nil
}

// Name returns "gvisor".
func (r *Runtime) Name() string { return Name }

// Capabilities says what gVisor can do. NetworkHost is not among the networks:
// the guests of all sandboxes would fight for one port.
func (r *Runtime) Capabilities() sandbox.Capabilities {
	return sandbox.Capabilities{
		Isolation:  sandbox.IsolationUserKernel,
		Roots:      []sandbox.RootKind{sandbox.RootEROFS, sandbox.RootHost},
		Networks:   []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkSandbox},
		Pause:      true,
		Snapshot:   true,
		Memory:     true,
		Changes:    true,
		Mounts:     true,
		CPULimit:   true,
		MemLimit:   true,
		DiskLimit:  true,
		PidsLimit:  true,
		Persistent: true,
	}
}

// Destroy removes the sandbox and all that was made for it.
func (r *Runtime) Destroy(_ context.Context, id string) error {
	return r.boxes.Destroy("gvisor.Destroy", id)
}

// List returns every sandbox, in the order of their IDs.
func (r *Runtime) List(context.Context) ([]sandbox.Status, error) { return r.boxes.List(), nil }

// Watch delivers events until ctx ends.
func (r *Runtime) Watch(ctx context.Context) <-chan sandbox.Event { return r.boxes.Events.Watch(ctx) }

// Close ends the pool and gives up the directory. Sandboxes go on.
func (r *Runtime) Close() error {
	if !r.boxes.Shut() {
		return nil
	}
	r.pool.close()
	return r.letGo()
}

// letGo lets all sentries go without ending them.
func (r *Runtime) letGo() error {
	close(r.stop)
	r.watches.Wait()
	return errors.Join(r.program.Close(), r.boxes.Close())
}
