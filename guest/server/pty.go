package server

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openPTY opens a new terminal of the given size, owned by the account on its
// slave side as programs such as ssh and screen need.
func openPTY(cols, rows uint32, acct account) (master, slave *os.File, err error) {
	// Non-blocking, so that Go's poller can interrupt a read.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, os.NewSyscallError("unlock terminal", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, os.NewSyscallError("number of terminal", err)
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := resizePTY(master, cols, rows); err != nil {
		slave.Close()
		return nil, nil, err
	}
	if canSwitch() {
		// Best effort: the shell works without it.
		_ = slave.Chown(acct.uid, -1)
		_ = slave.Chmod(0o620)
	}
	return master, slave, nil
}

// resizePTY sets the size of a terminal; 0 by 0 means the usual 80 by 24.
func resizePTY(master *os.File, cols, rows uint32) error {
	if cols == 0 && rows == 0 {
		cols, rows = 80, 24
	}
	size := unix.Winsize{Col: uint16(min(cols, 0xffff)), Row: uint16(min(rows, 0xffff))}
	raw, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	if err := raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &size)
	}); err != nil {
		return err
	}
	return os.NewSyscallError("set terminal size", ioctlErr)
}
