// Package vmm says what the microVM runtime needs of a virtual machine monitor:
// to boot a machine, to start one from saved state, and a few things about a
// machine that runs. docs/microvm.md tells how monitors map to it.
//
// Guest memory is a sealed memfd that many machines map privately: a clone costs
// what it writes. A machine's state is therefore what it changed of that memory,
// the state of its devices, and the layers of its disk.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/process"
)

// PageSize is the unit in which memory is compared and copied, in bytes.
const PageSize = 4096

// Driver starts machines of one monitor. It may be used from many goroutines.
type Driver interface {
	// Version names the monitor, its accelerator and what else device state
	// depends on: state of one version is never loaded by another.
	Version() string

	// Memory rounds a size of memory in bytes to one that machines can have.
	Memory(size int64) int64

	// CPUs is how many virtual processors a machine has that may use so many of
	// the host's.
	CPUs(wanted int) int

	// Start starts a machine. With a Kernel, or as a PC with Boot, it boots at once;
	// else it waits for Load. A failed Start leaves no process.
	Start(ctx context.Context, c Config) (Machine, error)

	// Adopt takes hold of a machine that an earlier process started with the
	// directory, or fails when it is gone.
	Adopt(ctx context.Context, dir string, p *process.Process) (Machine, error)
}

// Config is what a machine is made of. Files that it holds stay the caller's.
type Config struct {
	Dir    string        // of the machine's sockets; exists
	Port   string        // name of the virtio-serial port to the guest agent
	Group  *cgroup.Group // in which its process is born; exists
	Kernel *Kernel       // what it boots; nil: nothing, or a PC's first disk
	PC     bool          // has what systems look for that are not made for us: firmware, a PCI bus
	Boot   bool          // a PC: its firmware boots the first disk
	Memory *os.File      // memfd of the guest's memory, as long as that
	Size   int64         // bytes, as Driver.Memory rounds
	Shared bool          // writes go to Memory itself; else they are the machine's own
	CPUs   int           // virtual processors
	Disks  []Disk        // in the order in which the guest sees them
	Tap    *os.File      // the machine's network; nil: no network device
	MAC    net.HardwareAddr
}

// Kernel is what a machine boots. Paths are the host's.
type Kernel struct {
	Image  string
	Initrd string
	Args   string // its command line, which the driver adds to
}

// Disk is one block device.
type Disk struct {
	// Serial is the serial number by which the guest finds it.
	Serial string
	// Layers are files from the lowest to the uppermost. The lowest is raw unless
	// QCOW2 says otherwise, the others are qcow2; no header names another file.
	Layers []string
	// QCOW2 says that the lowest layer is qcow2, too.
	QCOW2 bool
	// Writable says that the guest writes to the uppermost layer.
	Writable bool
}

// Machine is one virtual machine. Its calls about state are made one at a time.
type Machine interface {
	// Move says that the machine's directory has another name now.
	Move(dir string)

	// Process is the monitor's process.
	Process() *process.Process

	// Serial returns the host's end of the guest agent's port. There is one at a
	// time: the machine drops the earlier, and that of a guest that starts anew.
	Serial() (net.Conn, error)

	// Console takes what the guest wrote to its console since the last call, the
	// newest ConsoleSize bytes at most. What it wrote last it is asked for after the
	// end, too.
	Console(ctx context.Context) ([]byte, error)

	// Load gives the device state to a machine that waits, and lets it run.
	Load(ctx context.Context, devices *os.File) error

	// Pause stops all processors, Resume lets them go on. Both are idempotent.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// SaveDevices writes the state of processors and devices of a paused machine
	// to a file that is open for writing only.
	SaveDevices(ctx context.Context, to *os.File) error

	// Changed finds the pages that a paused machine has changed of the memory it
	// was started with, in ascending order. Of a Shared one these are all that are
	// not zeros for want of a page.
	Changed() ([]Run, error)

	// Touched finds the pages that the machine has read or changed since it
	// started, in ascending order. A page that it read may bring its neighbours
	// along, up to 64 KiB, where these were in the host's memory already.
	Touched() ([]Run, error)

	// ReadPages and WritePages copy a whole number of pages, from a paused
	// machine, and into one that waits for Load.
	ReadPages(buf []byte, first uint32) error
	WritePages(buf []byte, first uint32) error

	// NewLayer opens an empty layer for a disk, and AddLayer makes the paused
	// machine write to it: what it wrote before stays as it is.
	NewLayer(ctx context.Context, disk int, layer string) error
	AddLayer(ctx context.Context, disk int) error

	// MergeLayers copies what lies between the lowest keep layers and the
	// uppermost one into the latter, while the machine runs.
	MergeLayers(ctx context.Context, disk, keep int) error

	// Receive makes a machine that waits take in one that another monitor sends,
	// instead of Load. state is where it reads that from. It looks at its disks no
	// sooner than it runs: until then the uppermost layer may be written by others.
	// Received waits until the other has arrived whole; Resume then lets it run.
	Receive(ctx context.Context, state *os.File) error
	Received(ctx context.Context) error

	// Send writes the machine to state, for one that Receives, while it runs, and
	// stops it for the last of it. It returns when all is written and the layers of
	// its disks are too, and when the machine was stopped. It does not go on by itself then, whatever happens to
	// the reader or to this process. When Send fails the machine goes on.
	Send(ctx context.Context, state *os.File) (stopped time.Time, err error)

	// Stay ends a Send, also one that this process knows nothing of, and lets the
	// machine go on. It may be called at any time.
	Stay(ctx context.Context) error

	// Given is how much of its memory, in bytes, the guest may use now, and Give asks
	// it to use so much: less, and it gives what it can do without back to the host
	// little by little; it takes that again by itself before it runs out of memory.
	Given(ctx context.Context) (int64, error)
	Give(ctx context.Context, size int64) error

	// Available asks the guest how much of its memory it could do without, what it
	// holds of its files included, in bytes. It takes some seconds.
	Available(ctx context.Context) (int64, error)

	// Ended is closed when the guest or the monitor has ended; Cause then says
	// why, in words for the user.
	Ended() <-chan struct{}
	Cause() string

	// Kill ends the monitor at once and waits until it is gone. Close lets it go
	// without ending it. Either is the last call.
	Kill() error
	Close() error
}

// ConsoleSize is how many bytes of a PC's console are kept until they are taken.
// Machines that are none have a console for a kernel's last words, and keep fewer.
const ConsoleSize = 1 << 20

// Run is a number of neighbouring pages.
type Run struct{ First, Count uint32 }

// MemoryName is the name of guest memory in the list of a process's mappings.
const MemoryName = "atoll-memory"

// NewMemory makes the memory of a guest, of size bytes, all zeros.
func NewMemory(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(MemoryName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), MemoryName)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("make memory: %w", err)
	}
	return f, nil
}

const (
	// sealTries bounds how often sealing is tried, sealPause apart: the kernel refuses while anything has a hold of a page, such
	// as what moves pages about or a monitor that has ended and is not gone yet.
	sealTries = 250
	sealPause = 20 * time.Millisecond
)

// Seal makes memory immutable for ever, which nobody may have mapped for writing.
func Seal(memory *os.File) error {
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
	for try := 1; ; try++ {
		_, err := unix.FcntlInt(memory.Fd(), unix.F_ADD_SEALS, seals)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || try == sealTries {
			return fmt.Errorf("seal memory: %w", err)
		}
		time.Sleep(sealPause)
	}
}
