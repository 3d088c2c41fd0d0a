package server

import (
	"os"
	"syscall"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
)

// stdio is the standard files of a process to be.
type stdio struct {
	theirs  []uintptr  // the child's 0, 1 and 2
	outputs []*os.File // what we read: stdout and stderr, or the terminal
	stdin   *os.File   // what we write; nil without stdin or with a terminal
	tty     *os.File   // the terminal's master side; nil without one
}

// openPTY makes a terminal. What it made before it failed is in f.
func (f *stdio) openPTY(size *processpb.PTY_Size, acct account) error {
	master, slave, err := openPTY(size.GetCols(), size.GetRows(), acct)
	if err != nil {
		return err
	}
	defer slave.Close()
	f.tty, f.outputs = master, []*os.File{master}
	for range 3 {
		fd, err := dupCloseOnExec(slave.Fd())
		if err != nil {
			return os.NewSyscallError("dup", err)
		}
		f.theirs = append(f.theirs, fd)
	}
	return nil
}

// openPipes makes pipes for output, and for stdin or else opens /dev/null. What
// it made before it failed is in f.
func (f *stdio) openPipes(stdin bool) error {
	if stdin {
		var fds [2]int
		if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
			return os.NewSyscallError("pipe", err)
		}
		f.theirs, f.stdin = append(f.theirs, uintptr(fds[0])), pollable(fds[1])
	} else {
		fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: os.DevNull, Err: err}
		}
		f.theirs = append(f.theirs, uintptr(fd))
	}
	for range 2 {
		var fds [2]int
		if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
			return os.NewSyscallError("pipe", err)
		}
		f.theirs, f.outputs = append(f.theirs, uintptr(fds[1])), append(f.outputs, pollable(fds[0]))
	}
	return nil
}

// pollable gives our end of a pipe to Go's poller. The child's end has nothing
// to do there, unlike with os.Pipe: that saves system calls, which cost much in
// a user-space kernel.
func pollable(fd int) *os.File {
	_ = syscall.SetNonblock(fd, true) // cannot fail on a pipe
	return os.NewFile(uintptr(fd), "pipe")
}

func dupCloseOnExec(fd uintptr) (uintptr, error) {
	n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
	if errno != 0 {
		return 0, errno
	}
	return n, nil
}

// closeTheirs closes the child's ends, which it has copies of once it runs.
func (f *stdio) closeTheirs() {
	for _, fd := range f.theirs {
		_ = syscall.Close(int(fd))
	}
}

// closeOurs closes what we would have kept.
func (f *stdio) closeOurs() {
	for _, file := range f.outputs {
		file.Close()
	}
	if f.stdin != nil {
		f.stdin.Close()
	}
}
