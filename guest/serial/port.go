package serial

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// portsDir is where the kernel lists the machine's virtio-serial ports.
const portsDir = "/sys/class/virtio-ports"

// hostAway is how long a port is left alone when no host is at its other end.
const hostAway = 20 * time.Millisecond

// Port is a virtio-serial port, seen from inside the machine. Reads and writes
// wait, also for a host to come back.
type Port struct{ file *os.File }

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
		return &Port{os.NewFile(uintptr(fd), device)}, nil
	}
	return nil, fmt.Errorf("serial port %q: %w", name, os.ErrNotExist)
}

// Read implements io.Reader. It does not return before it has read something.
func (p *Port) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(p.file.Fd()), b)
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
		n, err := unix.Write(int(p.file.Fd()), b[done:])
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

// Close closes the port.
func (p *Port) Close() error { return p.file.Close() }
