package node

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// started runs a shell command as the main command of a new sandbox.
func (h *host) started(req CreateRequest, script string) Sandbox {
	h.t.Helper()
	req.Image = HostImage
	sb, err := h.Run(context.Background(), RunRequest{Sandbox: req, Command: []string{"/bin/sh", "-c", script}}, func(RunEvent) {})
	if err != nil {
		h.t.Fatal(err)
	}
	return sb
}

// ended waits for the end of what there is to wait for.
func (h *host) ended(ref string) Sandbox {
	h.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	sb, err := h.Wait(ctx, ref)
	if err != nil {
		h.t.Fatal(err)
	}
	return sb
}

// gone waits until there is no record of a sandbox.
func (h *host) gone(id string) {
	h.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	for {
		_, err := h.Wait(ctx, id, sandbox.Terminated)
		if sandbox.Is(err, sandbox.NotFound) {
			break
		}
		if ctx.Err() != nil {
			h.t.Fatal(err)
		}
	}
	if m := h.machines(); len(m) != 0 {
		h.t.Errorf("machines are left: %v", m)
	}
}

// conformance: FR1.4
func TestTheEndOfAMainCommandIsSeen(t *testing.T) {
	h := newHost(t)
	sb := h.started(CreateRequest{Name: "job"}, "exit 3")
	if sb.Main.State != MainRunning || sb.Main.PID == 0 {
		t.Errorf("started: %+v", sb.Main)
	}
	got := h.ended("job")
	if got.State != sandbox.Running || got.Main.State != MainExited || got.Main.ExitCode != 3 || got.Main.EndedAt == nil {
		t.Errorf("%s, %+v", got.State, got.Main)
	}
	h.started(CreateRequest{Name: "killed"}, "kill -9 $$")
	if m := h.ended("killed").Main; m.ExitCode != 137 {
		t.Errorf("%+v", m)
	}
}

func TestASandboxThatIsToGoWithItsMainCommandGoes(t *testing.T) {
	h := newHost(t)
	sb := h.started(CreateRequest{Lifecycle: Lifecycle{Remove: true}}, "sleep 0.2; exit 4")
	if m := h.ended(sb.ID).Main; m.State != MainExited || m.ExitCode != 4 {
		t.Errorf("%+v", m)
	}
	h.gone(sb.ID)
}

// attached is a Run with a client, which may be made to go away.
type attached struct {
	leave  context.CancelFunc
	begun  chan Sandbox
	done   chan struct{} // closed when Run has returned
	stdout bytes.Buffer  // this and what follows: once done
	stderr bytes.Buffer
	sb     Sandbox
	err    error
}

func (h *host) attach(req CreateRequest, script string) *attached {
	req.Image = HostImage
	ctx, leave := context.WithCancel(context.Background())
	a := &attached{leave: leave, begun: make(chan Sandbox, 1), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.sb, a.err = h.Run(ctx, RunRequest{Sandbox: req, Command: []string{"/bin/sh", "-c", script}, Attach: true}, func(ev RunEvent) {
			if ev.Started != nil {
				a.begun <- *ev.Started
			}
			a.stdout.Write(ev.Stdout)
			a.stderr.Write(ev.Stderr)
		})
	}()
	return a
}

// running waits for the start of the command.
func (a *attached) running(t *testing.T) Sandbox {
	t.Helper()
	select {
	case sb := <-a.begun:
		return sb
	case <-a.done:
		t.Fatalf("not started: %v", a.err)
	}
	return Sandbox{}
}

func TestAnAttachedClientGetsAllOutputAndTheExitCode(t *testing.T) {
	h := newHost(t)
	a := h.attach(CreateRequest{Lifecycle: Lifecycle{Remove: true}}, "echo out; echo err >&2; seq 100000; exit 5")
	<-a.done
	if a.err != nil || a.sb.Main.ExitCode != 5 {
		t.Fatalf("%+v, %v", a.sb.Main, a.err)
	}
	if a.stderr.String() != "err\n" || !bytes.HasPrefix(a.stdout.Bytes(), []byte("out\n1\n")) || !bytes.HasSuffix(a.stdout.Bytes(), []byte("\n100000\n")) {
		t.Errorf("%d bytes, %q", a.stdout.Len(), a.stderr.String())
	}
	h.gone(a.sb.ID)
}

// conformance: NFR3.3
func TestASandboxThatIsToGoWithItsClientGoes(t *testing.T) {
	h := newHost(t)
	a := h.attach(CreateRequest{Lifecycle: Lifecycle{Remove: true}}, "sleep 1000")
	sb := a.running(t)
	a.leave()
	<-a.done
	wantKind(t, a.err, sandbox.Canceled)
	h.gone(sb.ID)

	kept := h.attach(CreateRequest{Name: "kept"}, "sleep 1000")
	kept.running(t)
	kept.leave()
	<-kept.done
	if sb, err := h.Get(context.Background(), "kept"); err != nil || sb.State != sandbox.Running || sb.Main.State != MainRunning {
		t.Errorf("%+v, %v", sb, err)
	}
}

func TestAMainCommandThatCannotStartLeavesNothing(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	for name, tc := range map[string]struct {
		req  RunRequest
		kind sandbox.Kind
	}{
		"no such command": {RunRequest{Command: []string{"no-such-command"}}, sandbox.NotFound},
		"no command":      {RunRequest{}, sandbox.Invalid},
		"no such workdir": {RunRequest{Command: []string{"true"}, Sandbox: CreateRequest{Workdir: "/no/such"}}, sandbox.Invalid},
	} {
		tc.req.Sandbox.Image = HostImage
		_, err := h.Run(ctx, tc.req, func(RunEvent) {})
		wantKind(t, err, tc.kind)
		if l, _ := h.List(ctx, Filter{All: true}); len(l) != 0 {
			t.Errorf("%s: left %v", name, l)
		}
	}
}

func TestAnAttachedClientLearnsWhyItsSandboxStopped(t *testing.T) {
	for name, tc := range map[string]struct {
		stop func(h *host, id string) error
		kind sandbox.Kind
		keep bool
	}{
		"out of memory": {func(h *host, id string) error { h.world.Kill(id, "out of memory"); return nil }, sandbox.Exhausted, false},
		"died":          {func(h *host, id string) error { h.world.Kill(id, "power cut"); return nil }, sandbox.Unavailable, false},
		"removed":       {func(h *host, id string) error { return h.Remove(context.Background(), id) }, sandbox.NotFound, false},
		"paused":        {func(h *host, id string) error { _, err := h.Pause(context.Background(), id, PauseDisk); return err }, sandbox.Conflict, true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			a := h.attach(CreateRequest{Lifecycle: Lifecycle{Remove: true}}, "sleep 1000")
			sb := a.running(t)
			if err := tc.stop(h, sb.ID); err != nil {
				t.Fatal(err)
			}
			<-a.done
			wantKind(t, a.err, tc.kind)
			if tc.keep {
				h.crash()
				h.open()
				if got := h.state(sb.ID); got != sandbox.Paused {
					t.Errorf("it is %s", got)
				}
				return
			}
			h.gone(sb.ID)
		})
	}
}

func TestAMainCommandIsFollowedAcrossACrashOfTheNode(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	await := func(name string) string {
		return "while [ ! -e " + filepath.Join(dir, name) + " ]; do sleep 0.02; done; "
	}
	tell := func(name string) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.started(CreateRequest{Name: "later"}, await("later")+"exit 6")
	meanwhile := h.started(CreateRequest{Name: "meanwhile", Lifecycle: Lifecycle{Remove: true}}, await("meanwhile")+"touch "+filepath.Join(dir, "seen")+"; exit 7")
	a := h.attach(CreateRequest{Lifecycle: Lifecycle{Remove: true}}, "sleep 1000")
	abandoned := a.running(t)
	h.crash()
	<-a.done
	tell("meanwhile")
	for _, err := os.Stat(filepath.Join(dir, "seen")); err != nil; _, err = os.Stat(filepath.Join(dir, "seen")) {
		time.Sleep(10 * time.Millisecond)
	}
	h.open()
	if _, err := h.Get(context.Background(), abandoned.ID); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("the abandoned one is there: %v", err)
	}
	tell("later")
	if m := h.ended("later").Main; m.State != MainExited || m.ExitCode != 6 {
		t.Errorf("later: %+v", m)
	}
	if err := h.Remove(context.Background(), "later"); err != nil {
		t.Error(err)
	}
	h.gone(meanwhile.ID)
}

func TestASandboxWhoseMainCommandNeverStartedIsRemoved(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	rec := h.create(CreateRequest{})
	rec.Main = &Main{Args: []string{"true"}, State: MainStarting} // killed before the start
	if err := h.store.put(ctx, kindSandbox, rec.ID, rec); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.open()
	if m := h.ended(rec.ID).Main; m.State != MainLost {
		t.Errorf("%+v", m)
	}
	wait, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	if _, err := h.Wait(wait, rec.ID, sandbox.Terminated); err != nil {
		t.Error(err)
	}
}
