package move

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// stateBuffer is the size in bytes of the buffers between QEMU and us. QEMU takes
// what they swallow for what has arrived, and stops the machine too early if
// that is much.
const stateBuffer = 64 << 10

// Out sends a machine that runs, and the file that is the uppermost layer of its
// disk, to In, by wire. It returns when all is written and the machine stands still,
// and when that began: nothing but Resume lets the machine go on. When it fails the
// machine goes on here.
func Out(ctx context.Context, from vmm.Machine, disk string, base Base, wire io.Writer) (stats Stats, stopped time.Time, err error) {
	layer, err := os.Open(disk)
	if err != nil {
		return stats, stopped, err
	}
	defer layer.Close()
	out, theirs, err := stateLine()
	if err != nil {
		return stats, stopped, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pumped := make(chan error, 1)
	go func() {
		var err error
		stats, err = Send(wire, out, base, layer)
		if err != nil {
			cancel()
		}
		out.Close() // the monitor must not wait for us
		pumped <- err
	}()
	stopped, err = from.Send(ctx, theirs)
	theirs.Close() // with the monitor's own, which it closed: the stream ends
	if err != nil {
		out.Close()
		return stats, stopped, errors.Join(err, <-pumped)
	}
	if err = <-pumped; err != nil {
		return stats, stopped, errors.Join(err, from.Stay(context.WithoutCancel(ctx)))
	}
	return stats, stopped, nil
}

// In takes in what Out sends, into a machine that waits for state: it was started in
// memory that begins as the base, with the same devices as the other, and with an
// empty uppermost layer of its disk, the file disk, upon the same layers. It returns when all has
// arrived; Resume then lets the machine run, once the other may not any more. When
// it fails the machine is to be killed. wire is closed when nobody waits for it any
// more.
func In(ctx context.Context, to vmm.Machine, disk string, base Base, wire io.ReadCloser) (Stats, error) {
	layer, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		return Stats{}, errors.Join(err, wire.Close())
	}
	defer layer.Close()
	in, theirs, err := stateLine()
	if err != nil {
		return Stats{}, errors.Join(err, wire.Close())
	}
	defer in.Close()
	err = to.Receive(ctx, theirs)
	theirs.Close() // the monitor has its own
	if err != nil {
		return Stats{}, errors.Join(err, wire.Close())
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-to.Ended():
			wire.Close()
		case <-ctx.Done():
			wire.Close()
		case <-over:
		}
	}()
	stats, err := Receive(in, wire, base, layer)
	in.Close()
	if err == nil {
		err = to.Received(ctx)
	}
	select {
	case <-to.Ended():
		err = errors.Join(err, fmt.Errorf("the machine that takes it in ended: %s", to.Cause()))
	default:
	}
	return stats, err
}

// stateLine returns our end and a monitor's end of a line.
func stateLine() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	near, theirs := os.NewFile(uintptr(fds[0]), "state"), os.NewFile(uintptr(fds[1]), "state")
	defer near.Close()
	for _, fd := range fds {
		for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
			err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, stateBuffer))
		}
	}
	if err == nil {
		ours, err = net.FileConn(near)
	}
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}
