package server

import (
	"context"
	"errors"
	"os"
	"time"
)

var (
	errNoTerminal = errors.New("the process has no terminal")
	errTerminal   = errors.New("the process has a terminal: send to the pty; end input with Ctrl-D (0x04)")
	errNoInput    = errors.New("the process's stdin is closed or was not asked for")
)

// write sends input to the terminal or to stdin. It waits while the process
// does not read, until ctx ends.
func (p *process) write(ctx context.Context, data []byte, toTTY bool) error {
	select {
	case <-p.inputs:
		defer func() { p.inputs <- struct{}{} }()
	case <-p.child.done:
		return errNoInput
	case <-ctx.Done():
		return ctx.Err()
	}
	f := p.stdin
	switch {
	case toTTY && p.tty == nil:
		return errNoTerminal
	case !toTTY && p.tty != nil:
		return errTerminal
	case toTTY:
		f = p.tty
	case f == nil:
		return errNoInput
	}
	interrupt := func() { _ = f.SetWriteDeadline(time.Now()) }
	stop := context.AfterFunc(ctx, interrupt)
	defer stop()
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-p.child.done:
			interrupt()
		case <-over:
		}
	}()
	for len(data) > 0 {
		_ = f.SetWriteDeadline(time.Time{})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if p.over() {
			return errNoInput
		}
		n, err := f.Write(data)
		data = data[n:]
		// A deadline may also be a late interrupt meant for an earlier write.
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return errNoInput
		}
	}
	return nil
}

// over reports whether the process was collected.
func (p *process) over() bool {
	select {
	case <-p.child.done:
		return true
	default:
		return false
	}
}

// closeStdin ends the process's input. It is idempotent.
func (p *process) closeStdin(ctx context.Context) error {
	if p.tty != nil {
		return errTerminal
	}
	select {
	case <-p.inputs:
	case <-p.child.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { p.inputs <- struct{}{} }()
	if p.stdin == nil {
		return nil
	}
	err := p.stdin.Close()
	p.stdin = nil
	return err
}
