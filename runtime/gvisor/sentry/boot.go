package sentry

import (
	"context"
	"errors"
	"math"
	"os"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe" // also for go:linkname

	"github.com/google/subcommands"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/cpuid"
	"gvisor.dev/gvisor/pkg/fd"
	"gvisor.dev/gvisor/pkg/metric"
	"gvisor.dev/gvisor/pkg/ring0"
	"gvisor.dev/gvisor/pkg/sentry/hostmm"
	"gvisor.dev/gvisor/pkg/timing"
	"gvisor.dev/gvisor/runsc/boot"
	"gvisor.dev/gvisor/runsc/cmd/sandboxsetup"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"
	"gvisor.dev/gvisor/runsc/specutils"
	"gvisor.dev/gvisor/runsc/starttime"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
)

// bootHeap is the size of the heap in bytes from which on garbage is collected
// even before the guest runs.
const bootHeap = 64 << 20

// settled is how long after its start a sandbox gives back the memory that only
// the start needed. It is no longer in anybody's way then.
const settled = 2 * time.Second

// bootCommand is the main program of a sentry. It does what runsc's command of
// the same name does for a sandbox like ours, and registers the control calls of
// inside.go besides gVisor's own.
type bootCommand struct {
	util.InternalSubCommand
	bundle     string
	fds        map[string]*int
	io, stdio  sandboxsetup.IntFlags
	stores     sandboxsetup.IntFlags
	mountConfs specutils.GoferMountConfFlags
	cpus       int
	memory     uint64
	hostMemory uint64
}

// Name implements subcommands.Command.
func (*bootCommand) Name() string { return "boot" }

// Synopsis implements subcommands.Command.
func (*bootCommand) Synopsis() string { return "run the kernel of a sandbox" }

// Usage implements subcommands.Command.
func (*bootCommand) Usage() string { return "boot [flags]: started by the runtime only\n" }

// SetFlags implements subcommands.Command.
func (b *bootCommand) SetFlags(f *flag.FlagSet) {
	f.StringVar(&b.bundle, "bundle", "", "the sandbox's directory")
	b.fds = make(map[string]*int)
	for _, name := range []string{"controller-fd", "spec-fd", "start-sync-fd", "mounts-fd", "rootfs-upper-tar-fd"} {
		b.fds[name] = f.Int(name, -1, "descriptor, see runsc boot")
	}
	f.Var(&b.io, "io-fds", "images and gofer sockets, the root first")
	f.Var(&b.stdio, "stdio-fds", "standard files of the guest agent")
	f.Var(&b.stores, "gofer-filestore-fds", "files that hold overlays")
	f.Var(&b.mountConfs, "gofer-mount-confs", "how the files of io-fds are mounted")
	f.IntVar(&b.cpus, "cpu-num", 1, "processors that the guest sees")
	f.Uint64Var(&b.memory, "total-memory", 0, "bytes of memory that the guest sees")
	f.Uint64Var(&b.hostMemory, "total-host-memory", 0, "bytes of memory of the host")
}

// setUpChroot leaves the process with an empty root and a minimal /proc.
//
//go:linkname setUpChroot gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd.setUpChroot
func setUpChroot(spec *specs.Spec, conf *config.Config, timer *timing.Timer) error

// Execute implements subcommands.Command. It returns when the sandbox ends.
func (b *bootCommand) Execute(_ context.Context, _ *flag.FlagSet, args ...any) subcommands.ExitStatus {
	conf, status := args[0].(*config.Config), args[1].(*unix.WaitStatus)
	timer := starttime.Timer("boot")
	// Collecting garbage would take a good part of the boot and of a restore.
	debug.SetMemoryLimit(bootHeap)
	debug.SetGCPercent(-1)
	cpuid.Initialize()
	ring0.InitDefault()
	thp := boot.HostTHP{}
	if conf.AppHugePages { // unknown values mean no huge pages
		thp.ShmemEnabled, _ = hostmm.ReadTransparentHugepageEnum("shmem_enabled")
		thp.Defrag, _ = hostmm.ReadTransparentHugepageEnum("defrag")
	}
	spec, unmountProc := b.confine(conf, timer)
	l, err := boot.New(boot.Args{
		ID: orders.ContainerID, Spec: spec, Conf: conf,
		ControllerFD: *b.fds["controller-fd"], PinRingFD: -1, Device: fd.New(-1), ExecFD: -1, PodInitConfigFD: -1,
		GoferFDs: b.io.GetArray(), DevGoferFD: -1, StdioFDs: b.stdio.GetArray(), GoferFilestoreFDs: b.stores.GetArray(),
		GoferMountConfs: b.mountConfs.GetArray(), NumCPU: b.cpus, CPUQuota: -1, TotalMem: b.memory, TotalHostMem: b.hostMemory,
		HostTHP: thp, RootfsUpperTarFD: *b.fds["rootfs-upper-tar-fd"], StartupTimer: timer,
	})
	if err != nil {
		util.Fatalf("creating the kernel: %v", err)
	}
	l.PreSeccompCallback = func() { sandboxsetup.UmountProcFile(unmountProc) }
	if err := metric.Initialize(); err != nil {
		util.Fatalf("initializing metrics: %v", err)
	}
	sync := os.NewFile(uintptr(*b.fds["start-sync-fd"]), "start-sync")
	if _, err := sync.Write([]byte{1}); err != nil {
		util.Fatalf("telling the runtime: %v", err)
	}
	sync.Close()
	l.WaitForStartSignal()
	if err := l.Run(); err != nil {
		l.Destroy()
		util.Fatalf("starting sandbox: %v", err)
	}
	debug.SetGCPercent(100)
	debug.SetMemoryLimit(math.MaxInt64)
	time.AfterFunc(settled, debug.FreeOSMemory)
	if err := serveInside(l); err != nil {
		util.Fatalf("serving the runtime: %v", err)
	}
	*status = unix.WaitStatus(l.WaitExit())
	l.Destroy()
	return subcommands.ExitSuccess
}

// confine reads the spec and then leaves the process with an empty root and
// without any capability. unmountProc is the pipe to a helper that takes away
// /proc as well, which gVisor needs until its filter is in force.
func (b *bootCommand) confine(conf *config.Config, timer *timing.Timer) (spec *specs.Spec, unmountProc *os.File) {
	file := os.NewFile(uintptr(*b.fds["spec-fd"]), "spec")
	spec, err := specutils.ReadSpecFromFile(b.bundle, file, conf)
	if err != nil {
		util.Fatalf("reading spec: %v", err)
	}
	file.Close()
	if err := setUpChroot(spec, conf, timer); err != nil {
		util.Fatalf("setting up an empty root: %v", err)
	}
	_, unmountProc = sandboxsetup.ExecProcUmounter()
	if err := dropCapabilities(); err != nil {
		util.Fatalf("dropping capabilities: %v", err)
	}
	if n := *b.fds["mounts-fd"]; n >= 0 {
		mounts := os.NewFile(uintptr(n), "mounts")
		if spec.Mounts, err = specutils.ReadMounts(mounts); err != nil {
			util.Fatalf("reading mounts from the gofer: %v", err)
		}
		mounts.Close()
	}
	return spec, unmountProc
}

// dropCapabilities leaves no thread a capability, nor a way to gain one. runsc
// empties the bounding set as well, which stops all threads forty times and, with
// no new privileges, changes nothing.
func dropCapabilities() error {
	if config.CgoEnabled {
		return errors.New("this program was built with cgo, which has threads that Go does not reach; build it with CGO_ENABLED=0")
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == 0 {
		_, _, errno = syscall.AllThreadsSyscall(unix.SYS_CAPSET,
			uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	}
	if errno != 0 {
		return errno
	}
	return nil
}
