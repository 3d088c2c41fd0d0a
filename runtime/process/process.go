// Package process holds processes that outlive whoever started them, so that they
// can be found again, waited for and ended without ever meeting a stranger.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one process, our child or one that an earlier process started. Its
// exported fields can be written down and opened again later.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot: tells a process from a later one with its number

	pidfd *os.File // readable once the process is dead; nil until Open
}

// Open takes hold of the process, or fails with ESRCH when it is gone.
func (p *Process) Open() error {
	fd, err := unix.PidfdOpen(p.PID, unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	start, err := startTime(p.PID)
	if err == nil && p.Start != 0 && start != p.Start {
		err = unix.ESRCH
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	p.Start = start
	p.pidfd = os.NewFile(uintptr(fd), "pidfd")
	return nil
}

// Wait returns when the process is dead, and reaps it if it is our child. It
// fails when ctx ends first or the process is let go.
func (p *Process) Wait(ctx context.Context) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if err != nil {
		return err
	}
	var reaped error
	err = conn.Control(func(fd uintptr) {
		var info unix.Siginfo
		reaped = unix.Waitid(unix.P_PIDFD, int(fd), &info, unix.WEXITED, nil)
	})
	if errors.Is(reaped, unix.ECHILD) {
		reaped = nil // another process's child, or reaped already
	}
	return errors.Join(err, reaped)
}

// Kill ends the process at once. A dead one is no error.
func (p *Process) Kill() error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sigErr error
	err = conn.Control(func(fd uintptr) { sigErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if err == nil {
		err = sigErr
	}
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Start takes hold of a command that was not started yet, and starts it. Its end
// must be awaited by Wait, not by the command.
func Start(cmd *exec.Cmd) (*Process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{PID: cmd.Process.Pid}
	_ = cmd.Process.Release() // waited for through its pidfd
	if err := p.Open(); err != nil {
		_ = unix.Kill(p.PID, unix.SIGKILL)
		_, _ = unix.Wait4(p.PID, nil, 0, nil)
		return nil, err
	}
	return p, nil
}

// Close lets the process go without ending it.
func (p *Process) Close() error { return p.pidfd.Close() }

// startTime reads when a process began, in clock ticks since boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, unix.ESRCH
	}
	// The name in parentheses may hold anything; 20 fields follow up to the start time.
	_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("malformed stat of process %d", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Ending reports whether the process is dead or about to be: the kernel takes a
// while to give back the much memory of a killed process, whose sockets are shut already.
func (p *Process) Ending() bool {
	const exiting = 0x4 // PF_EXITING
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		return true
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return true
	}
	flags, _ := strconv.ParseUint(fields[6], 10, 64)
	return fields[0] == "Z" || flags&exiting != 0 || fields[19] != strconv.FormatUint(p.Start, 10)
}

// Dead reports whether the process has ended.
func (p *Process) Dead() bool {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return true
	}
	dead := true
	_ = conn.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		dead = err == nil && n > 0
	})
	return dead
}
