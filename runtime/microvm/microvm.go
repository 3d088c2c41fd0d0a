// Package microvm runs every sandbox on a kernel of its own, in a virtual machine.
//
// A machine is a clone of a template: the same kernel, root, size and devices,
// booted once up to the guest agent and then frozen. Clones map the template's
// memory privately, so that each costs what it writes. A snapshot is what a
// machine changed of that memory, the state of its devices, and the layers of its
// disk; forks of it start in the same way as clones of a template do.
//
// What is needed to find machines again is in Config.Dir, and what several nodes
// may share in Config.Cache:
//
//	DIR/lock                  held by the one Runtime that owns the directory
//	DIR/s/<id>/               one sandbox: record.json, sockets, its memory's origin, its disk's layers
//	CACHE/kernel, CACHE/disk  kernels and empty file systems
//	CACHE/templates/<key>/    template.json, memory, devices, disk
//	CACHE/accelerator.json    whether this host runs machines under KVM
package microvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/runtime/microvm/kernel"
	"github.com/atoll-run/atoll/runtime/microvm/qemu"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// Name is the word by which users choose this runtime.
const Name = "microvm"

// Config says where and how a Runtime keeps its machines.
type Config struct {
	// Dir holds the sandboxes. It is made if it is missing. One Runtime at a time may own it.
	Dir string
	// Cache holds what is the same for all: kernels and templates. Several
	// runtimes may share it. Empty means a directory in Dir.
	Cache string
	// Guest is the host path of the static guest agent.
	Guest string
	// Prefix names the control group under which all machines of this runtime
	// lie; empty means a name derived from Dir. No two directories may share one.
	Prefix string
	// QEMU is the monitor's program; empty means the one in the search path.
	QEMU string
	// Kernel is a vmlinux or bzImage to boot instead of the distribution's, and
	// Modules the directory of its modules; empty when its drivers are built in.
	Kernel, Modules string
	// Accelerator is "kvm" or "tcg"; empty means KVM where a machine really runs under it.
	Accelerator string
	// Prewarm bounds how many machines of the kind used last are kept ready; how
	// many there are follows demand. 0 keeps none.
	Prewarm int
	// Overcommit is how many times the host's memory all machines together may
	// have as theirs; 0 means 10. Whatever it is, none is made when there is
	// little left.
	Overcommit float64
	// Defaults fills the zero fields of a spec's Resources. Its own zero fields
	// mean: 1 GiB of memory, 10 GiB of disk, 4096 processes, 1 CPU.
	Defaults sandbox.Resources
	// Log receives what happens; nil discards it.
	Log *slog.Logger
}

// Runtime is the microVM runtime. Its methods may be called from many goroutines.
type Runtime struct {
	cfg       Config
	log       *slog.Logger
	boxes     *boxes
	qemu      *qemu.Driver
	driver    vmm.Driver // the same, as all but prepare know it
	taps      *taps
	templates *templates
	memories  *memories
	pagers    *pagers
	pool      *pool
	balloons  *balloons
	step      func(name string) // called between the steps of a snapshot and a fork; tests end the process there

	preparing chan struct{} // holds one token while prepare is at work
	kernel    kernel.Kernel // zero until prepare got it; guarded by preparing
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New opens the runtime at cfg.Dir, adopts the machines that an earlier process
// left running there and removes what it left half made. It fails with
// Unsupported where there is no QEMU, Denied where the host does not allow what
// machines need, and Conflict when another process owns the directory.
//
// The first machine on a host takes longer: a kernel is fetched, a template made,
// and it is found out whether KVM works.
func New(ctx context.Context, cfg Config) (*Runtime, error) {
	const op = "microvm.New"
	if os.Geteuid() != 0 {
		return nil, sandbox.Errorf(op, sandbox.Denied, "",
			"machines need root for control groups and network namespaces, and this process runs as uid %d", os.Geteuid()).
			WithHint("run it with sudo or as a system service")
	}
	driver, err := qemu.Open(ctx, cfg.QEMU)
	if err != nil {
		return nil, sandbox.E(op, "", "", err)
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, cfg.Dir, err)
	}
	cfg.fill()
	if err := os.MkdirAll(filepath.Join(cfg.Cache, "templates"), 0o700); err != nil {
		return nil, sandbox.E(op, supervisor.Kind(err), "", err)
	}
	r := &Runtime{cfg: cfg, log: cfg.Log, qemu: driver, driver: driver, preparing: make(chan struct{}, 1), step: func(string) {}}
	r.boxes, err = supervisor.Open[*record, *vm](supervisor.Config{Name: Name, Dir: cfg.Dir, Prefix: cfg.Prefix, Admit: r.admit, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	if err := r.open(ctx); err != nil {
		return nil, errors.Join(sandbox.E(op, "", "", err), r.boxes.Close())
	}
	return r, nil
}

// fill puts defaults where nothing was said.
func (cfg *Config) fill() {
	if cfg.Cache == "" {
		cfg.Cache = filepath.Join(cfg.Dir, "cache")
	}
	if cfg.Prefix == "" {
		sum := blake3.Sum256([]byte(cfg.Dir))
		cfg.Prefix = fmt.Sprintf("atoll-%x-vm", sum[:5])
	}
	if cfg.Overcommit == 0 {
		cfg.Overcommit = 10
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Defaults = cfg.Defaults.Or(sandbox.Resources{CPUs: 1, Memory: 1 << 30, Disk: 10 << 30, Pids: 4096})
}

// open does the part of New that needs the directory's lock.
func (r *Runtime) open(ctx context.Context) error {
	var err error
	if r.taps, err = openTaps(); err != nil {
		return err
	}
	r.memories = newMemories()
	if r.pagers, err = openPagers(r); err != nil {
		return err
	}
	r.templates = newTemplates(r)
	if err := r.boxes.Adopt(func(b *box) (*vm, error) { return r.takeOver(ctx, b) }); err != nil {
		return err
	}
	if err := errors.Join(r.templates.sweep(), r.pagers.sweep()); err != nil {
		return err
	}
	r.pool = newPool(r, r.cfg.Prewarm)
	r.balloons = newBalloons(r)
	return nil
}

// Name returns "microvm".
func (r *Runtime) Name() string { return Name }

// Capabilities says what machines can do. Mounts are not among it: a directory of
// the host cannot be shared with a machine that may be frozen and copied. The limit
// of processes is held by the guest's own kernel: root inside can lift it, and
// meets the limits of memory and processors. Of a full disk image, whose kernel is its
// own, neither the number of processes is bounded nor can changes be told, and a
// machine without the agent has no snapshots.
func (r *Runtime) Capabilities() sandbox.Capabilities {
	return sandbox.Capabilities{
		Isolation:  sandbox.IsolationMachine,
		Roots:      []sandbox.RootKind{sandbox.RootEROFS, sandbox.RootDisk},
		Networks:   []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkSandbox},
		Pause:      true,
		Snapshot:   true,
		Memory:     true,
		Live:       true,
		Changes:    true,
		CPULimit:   true,
		MemLimit:   true,
		DiskLimit:  true,
		PidsLimit:  true,
		Persistent: true,
		Checks:     []string{memoryName + "*", devicesName},
		Late:       []string{memoryName + "*"},
		Beside:     []string{learnedName},
	}
}

// Destroy removes the sandbox and all that was made for it.
func (r *Runtime) Destroy(_ context.Context, id string) error {
	return r.boxes.Destroy("microvm.Destroy", id)
}

// List returns every sandbox, in the order of their IDs.
func (r *Runtime) List(context.Context) ([]sandbox.Status, error) { return r.boxes.List(), nil }

// Watch delivers events until ctx ends.
func (r *Runtime) Watch(ctx context.Context) <-chan sandbox.Event { return r.boxes.Events.Watch(ctx) }

// Close ends the pool and gives up the directory. Machines go on.
func (r *Runtime) Close() error {
	if !r.boxes.Shut() {
		return nil
	}
	r.balloons.close()
	r.pool.close()
	r.templates.close()
	r.pagers.stopLearning()
	err := r.boxes.Close()
	r.memories.close()
	r.pagers.close()
	r.taps.close()
	return err
}

// prepare gets the kernel and finds out by what machines run here, once.
func (r *Runtime) prepare(ctx context.Context) (kernel.Kernel, error) {
	select {
	case r.preparing <- struct{}{}:
		defer func() { <-r.preparing }()
	case <-ctx.Done():
		return kernel.Kernel{}, ctx.Err()
	}
	if r.kernel.Digest != "" {
		return r.kernel, nil
	}
	k, err := kernel.Fetch(ctx, kernel.Options{
		Dir: filepath.Join(r.cfg.Cache, "kernel"), Guest: r.cfg.Guest, Kernel: r.cfg.Kernel, Modules: r.cfg.Modules, Log: r.log,
	})
	if err == nil {
		err = r.accelerate(ctx, k)
	}
	if err == nil {
		r.kernel = k
	}
	return k, err
}

// accelerate decides by what machines run here.
func (r *Runtime) accelerate(ctx context.Context, k kernel.Kernel) error {
	switch r.cfg.Accelerator {
	case "tcg":
		r.qemu.Emulate()
		return nil
	case "", "kvm":
	default:
		return sandbox.Errorf("microvm.New", sandbox.Invalid, r.cfg.Accelerator, "an accelerator is kvm or tcg")
	}
	why, err := r.qemu.Accelerate(ctx, filepath.Join(r.cfg.Cache, "accelerator.json"), k.Vmlinux, r.boxes.Groups.Group("probe"))
	if err != nil {
		return err
	}
	if why != "" && r.cfg.Accelerator == "kvm" {
		return sandbox.Errorf("microvm.New", sandbox.Unsupported, "", "machines do not run under KVM here: %s", why)
	}
	if why != "" {
		r.log.Info("machines are emulated", "reason", why)
	}
	return nil
}
