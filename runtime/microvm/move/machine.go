package move

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// Report says how a move went.
type Report struct {
	Stats    // as the sender counts
	Total    time.Duration
	Downtime time.Duration // from the machine's stop here to its start there
}

// Options says how to move.
type Options struct {
	Base Base // what the memory of the target begins as
	Disk int  // the one that moves along, by its place among the machine's disks
	// Verify compares so many bytes of both memories before the machine starts at
	// its target: all of them, if it is the machine's size. 0: nothing. It takes
	// about a millisecond for each 4 MiB, while the machine stands still.
	Verify int64
}

// stateBuffer is the size in bytes of the buffers between QEMU and us. QEMU takes
// what they swallow for what has arrived, and stops the machine too early if
// that is much.
const stateBuffer = 64 << 10

// Machine moves the machine from to the machine to, which waits for state: it was
// started in memory that begins as the base, with the same devices as from, and with
// an empty uppermost layer of the disk upon the same layers. Afterwards to runs
// and from stands still, to be killed. When it fails from runs on, and to is to
// be killed.
func Machine(ctx context.Context, from, to vmm.Machine, o Options) (r Report, err error) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	listener, target, err := diskLine()
	if err != nil {
		return r, fmt.Errorf("connect the disks: %w", err)
	}
	defer listener.Close()
	defer target.Close()
	out, fromEnd, err := stateLine()
	if err != nil {
		return r, err
	}
	defer out.Close()
	in, toEnd, err := stateLine()
	if err != nil {
		return r, errors.Join(err, fromEnd.Close())
	}
	defer in.Close()
	err = to.Receive(ctx, o.Disk, toEnd, listener)
	toEnd.Close() // the monitor has its own
	if err != nil {
		return r, errors.Join(err, fromEnd.Close())
	}
	pumps := make(chan error, 2)
	near, far := net.Pipe()
	go func() {
		var err error
		r.Stats, err = Send(near, out, o.Base)
		if err != nil {
			out.Close() // the monitor must not wait for us
		}
		near.Close()
		pumps <- err
	}()
	go func() {
		_, err := Receive(in, far, o.Base)
		far.Close()
		in.Close()
		if err != nil {
			cancel() // the machine will never arrive
		}
		pumps <- err
	}()
	stopped, err := from.Send(ctx, o.Disk, fromEnd, target)
	fromEnd.Close() // with the monitor's own, which it closed: the stream ends
	if err != nil {
		cancel()
		out.Close()
	}
	err = errors.Join(err, <-pumps, <-pumps)
	if err == nil {
		err = to.Received(ctx)
	}
	if err == nil {
		err = compare(from, to, o.Verify)
	}
	if err == nil {
		err = to.Resume(ctx)
	}
	if err != nil {
		return r, errors.Join(err, from.Resume(context.WithoutCancel(ctx)))
	}
	r.Total, r.Downtime = time.Since(began), time.Since(stopped)
	return r, nil
}

// compare looks whether two machines that stand still have the same memory.
func compare(a, b vmm.Machine, size int64) error {
	const unit = 1 << 20
	left, right := make([]byte, unit), make([]byte, unit)
	for at := int64(0); at < size; at += unit {
		n := min(unit, size-at)
		first := uint32(at / vmm.PageSize)
		if err := errors.Join(a.ReadPages(left[:n], first), b.ReadPages(right[:n], first)); err != nil {
			return err
		}
		if !bytes.Equal(left[:n], right[:n]) {
			return fmt.Errorf("memory from %#x on is not what it was: the move is void", at)
		}
	}
	return nil
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

// diskLine returns a listening socket and a connection to it. Nobody else can
// connect: its name is gone.
func diskLine() (listener, target *os.File, err error) {
	dir, err := os.MkdirTemp("", "atoll-move-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "s")})
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "s")})
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	if listener, err = l.File(); err != nil {
		return nil, nil, err
	}
	if target, err = c.File(); err != nil {
		return nil, nil, errors.Join(err, listener.Close())
	}
	return listener, target, nil
}
