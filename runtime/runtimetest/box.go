package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strings"
	"syscall"
	"testing"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/sandbox"
)

// box is one sandbox, worked with through its guest as everybody does.
type box struct {
	t    *testing.T
	rt   sandbox.Runtime
	id   string
	dir  string // see Subject.Dir
	spec sandbox.Spec
}

// output is how a command ended.
type output struct {
	Stdout, Stderr string
	Exit           int // as a shell reports it
}

// client returns a new client, so that nothing is kept open over snapshots.
func (b *box) client() *guest.Client {
	return guest.New(func(ctx context.Context) (net.Conn, error) {
		return b.rt.Dial(ctx, b.id, sandbox.GuestPort)
	}, guest.Options{})
}

func (b *box) shell(script string) guest.Command {
	return guest.Command{Args: []string{"/bin/sh", "-c", script}, Dir: b.dir}
}

// run runs a shell script.
func (b *box) run(script string) (output, error) {
	c := b.client()
	defer c.CloseIdle()
	out, err := c.Run(deadline(b.t), b.shell(script))
	if err != nil {
		return output{}, err
	}
	return output{string(out.Stdout), string(out.Stderr), out.ShellCode()}, nil
}

// sh runs a shell script that may fail.
func (b *box) sh(script string) output {
	b.t.Helper()
	out, err := b.run(script)
	if err != nil {
		b.t.Fatalf("run %q: %v", script, err)
	}
	return out
}

// try runs a shell script in a sandbox that may die of it. It may be called
// from any goroutine.
func (b *box) try(script string) output {
	out, err := b.run(script)
	if err != nil {
		return output{Stderr: err.Error(), Exit: -1}
	}
	return out
}

// must runs a shell script that must succeed and returns what it prints.
func (b *box) must(script string) string {
	b.t.Helper()
	out := b.sh(script)
	if out.Exit != 0 {
		b.t.Fatalf("%q ended with %d: %s", script, out.Exit, out.Stderr)
	}
	return out.Stdout
}

// stalled starts a shell script whose output is not read until stop ends it.
func (b *box) stalled(script string) (stop func()) {
	b.t.Helper()
	c := b.client()
	p, err := c.Start(deadline(b.t), b.shell(script))
	if err != nil {
		b.t.Fatalf("start %q: %v", script, err)
	}
	return func() {
		if err := c.Signal(deadline(b.t), p.PID, syscall.SIGKILL); err != nil {
			b.t.Errorf("kill: %v", err)
		}
		p.Close()
		c.CloseIdle()
	}
}

func (b *box) write(name string, data []byte) {
	b.t.Helper()
	c := b.client()
	defer c.CloseIdle()
	if err := c.WriteFile(deadline(b.t), path.Join(b.dir, name), bytes.NewReader(data)); err != nil {
		b.t.Fatalf("write %s: %v", name, err)
	}
}

func (b *box) read(name string) []byte {
	b.t.Helper()
	c := b.client()
	defer c.CloseIdle()
	r, err := c.ReadFile(deadline(b.t), path.Join(b.dir, name))
	if err != nil {
		b.t.Fatalf("read %s: %v", name, err)
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		b.t.Fatalf("read %s: %v", name, err)
	}
	return data
}

func (b *box) stats() sandbox.Stats {
	b.t.Helper()
	st, err := b.rt.Stats(deadline(b.t), b.id)
	if err != nil {
		b.t.Fatalf("Stats: %v", err)
	}
	return st
}

// counter is a process that lives on in a sandbox. What it answers depends on
// its memory (a variable), on an open file that has no name any more, and on
// the file's offset.
type counter struct{ b *box }

func (b *box) startCounter() counter {
	b.t.Helper()
	b.must(`seq -f line%g 100 > lines; mkfifo in out
setsid sh -c 'exec 3<lines; rm lines; n=0
while read x < in; do n=$((n+1)); read l <&3; echo "$$ $n $l" > out; done' >/dev/null 2>&1 </dev/null &`)
	return counter{b}
}

// ask asks the process once, for the n-th time of its life, and returns its PID.
func (c counter) ask(n int) (pid string) {
	c.b.t.Helper()
	answer := c.b.must("echo x > in; cat out")
	pid, rest, _ := strings.Cut(strings.TrimSpace(answer), " ")
	if want := fmt.Sprintf("%d line%d", n, n); rest != want {
		c.b.t.Fatalf("the process answers %q, want its PID and %q", answer, want)
	}
	return pid
}
