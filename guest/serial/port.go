package serial

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// portsDir is where the kernel lists the machine's virtio-serial ports.
const portsDir = "/sys/class/virtio-ports"

// hostAway is how long a port is left alone when no host is at its other end.
const hostAway = 20 * time.Millisecond

// Port is a virtio-serial port, seen from inside the machine. Reads and writes
// wait, also for a host to come back.
type Port struct {
	file *os.File
	rest atomic.Int32 // one of the states below
}

// What the next calls of a port do.
const (
	portAwake   = iota // let Go run something else meanwhile
	portResting        // Read holds the processor until there is something; then it is
	portRoused         // so that Write does too, until the next Read
)

// Rest makes the next Read hold Go's only processor while it waits, and what is
// written until the Read after that: nothing else runs in the agent. It is for a
// machine that is about to be frozen, to become a template. A clone's agent then
// goes on reading as if nothing had been: Go need not look for a processor, nor wake
// the thread that watches over them, which is a third of what a clone has to do
// until it answers.
func (p *Port) Rest() { p.rest.Store(portResting) }

// OpenPort opens the port that the machine's maker gave this name.
func OpenPort(name string) (*Port, error) {
	found, err := filepath.Glob(portsDir + "/*/name")
	if err != nil {
		return nil, err
	}
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(text)) != name {
			continue
		}
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(path)))
		// Blocking, and so outside Go's poller, which misses this driver's wake-ups.
		fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", device, err)
		}
		return &Port{file: os.NewFile(uintptr(fd), device)}, nil
	}
	return nil, fmt.Errorf("serial port %q: %w", name, os.ErrNotExist)
}

// Read implements io.Reader. It does not return before it has read something.
func (p *Port) Read(b []byte) (int, error) {
	fd := int(p.file.Fd())
	for {
		var n int
		var err error
		if p.rest.Load() == portResting {
			n, err = raw(unix.SYS_READ, fd, b)
			p.rest.Store(portRoused)
		} else {
			p.rest.Store(portAwake)
			n, err = unix.Read(fd, b)
		}
		switch {
		case n > 0:
			return n, nil
		case n == 0 || errors.Is(err, unix.EAGAIN):
			time.Sleep(hostAway)
		case !errors.Is(err, unix.EINTR):
			return 0, err
		}
	}
}

// Write implements io.Writer.
func (p *Port) Write(b []byte) (int, error) {
	for done := 0; ; {
		if done == len(b) {
			return done, nil
		}
		var n int
		var err error
		if p.rest.Load() == portRoused {
			n, err = raw(unix.SYS_WRITE, int(p.file.Fd()), b[done:])
		} else {
			n, err = unix.Write(int(p.file.Fd()), b[done:])
		}
		switch {
		case n > 0:
			done += n
		case err == nil || errors.Is(err, unix.EAGAIN):
			time.Sleep(hostAway)
		case !errors.Is(err, unix.EINTR):
			return done, err
		}
	}
}

// raw reads or writes, which Go's scheduler is not told.
func raw(call uintptr, fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	runtime.KeepAlive(b)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

// Close closes the port.
func (p *Port) Close() error { return p.file.Close() }
