package node

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
)

// paused samples until a sandbox is paused.
func (h *host) paused(ref string) Sandbox {
	h.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		h.sample(context.Background())
		if sb, err := h.Get(context.Background(), ref); err != nil || sb.State == sandbox.Paused {
			return sb
		}
	}
	h.t.Fatalf("%s is %s", ref, h.state(ref))
	return Sandbox{}
}

func TestWhoIsIdle(t *testing.T) {
	begin := time.Unix(1e9, 0)
	at := func(s int) time.Time { return begin.Add(time.Duration(s) * time.Second) }
	var u usage
	for _, step := range []struct {
		second int
		open   int
		cpu    time.Duration
		want   bool
	}{
		{0, 0, time.Second, false},                         // it has just begun
		{5, 0, time.Second + 100*time.Millisecond, false},  // not for long enough
		{10, 0, time.Second + 200*time.Millisecond, true},  // 2 % of a processor is nothing
		{15, 1, time.Second + 200*time.Millisecond, false}, // somebody came
		{24, 0, time.Second + 200*time.Millisecond, false}, // and left
		{25, 0, time.Second + 200*time.Millisecond, true},  //
		{30, 0, time.Second + 600*time.Millisecond, false}, // 8 %: it works
		{40, 0, 100 * time.Millisecond, true},              // resumed, its clock of work began anew
	} {
		u.open = step.open
		if got := u.look(step.cpu, at(step.second), 10*time.Second); got != step.want {
			t.Errorf("after %d s: idle is %t", step.second, got)
		}
	}
}

func TestAnIdleSandboxIsPausedAndTheNextUseResumesIt(t *testing.T) {
	h := newHost(t)
	h.crash()
	caps := fake.Capabilities()
	caps.Memory = true
	h.caps = &caps
	h.open()
	h.create(CreateRequest{Name: "idle", Lifecycle: Lifecycle{Idle: time.Nanosecond}, Ports: []Port{{Guest: sandbox.GuestPort}}})
	h.create(CreateRequest{Name: "other"})
	h.sh("idle", "echo kept > note")
	if sb := h.paused("idle"); sb.Suspended == "" {
		t.Error("its memory was not given back")
	}
	if s := h.state("other"); s != sandbox.Running {
		t.Errorf("the one that asked for nothing is %s", s)
	}
	if got := h.sh("idle", "cat note"); got != "kept" {
		t.Errorf("it has %q", got)
	}

	sb := h.paused("idle")
	health := func() {
		t.Helper()
		c, err := net.Dial("tcp", net.JoinHostPort(sb.Ports[0].HostIP, fmt.Sprint(sb.Ports[0].Host)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "GET /health HTTP/1.0\r\n\r\n")
		if n, err := c.Read(make([]byte, 64)); n == 0 {
			t.Errorf("its published port does not answer: %v", err)
		}
	}
	health()
	h.paused("idle")
	former := h.Node
	h.crash()
	for _, e := range former.entries { // as the end of its process would
		e.closeLocal()
	}
	h.open()
	health()
}

func TestASandboxIsNotPausedUnderAConnection(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "used", Lifecycle: Lifecycle{Idle: time.Nanosecond}})
	c, err := h.Dial(ctx, "used", sandbox.GuestPort)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		h.sample(ctx)
	}
	if s := h.state("used"); s != sandbox.Running {
		t.Errorf("it is %s", s)
	}
	c.Close()
	h.paused("used")
}

// Those who come while it is being paused find it running, whoever was first.
func TestWhoComesWhileASandboxIsBeingPausedIsServed(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "busy", Lifecycle: Lifecycle{Idle: time.Nanosecond}})
	for i := range 10 {
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 3 {
				h.sample(ctx)
			}
		}()
		if got := h.sh("busy", fmt.Sprint("echo ", i)); got != fmt.Sprint(i) {
			t.Errorf("it says %q", got)
		}
		<-done
	}
}

func TestARuntimeWithoutSnapshotsFreezesIdleSandboxes(t *testing.T) {
	h := newHost(t)
	h.crash()
	caps := fake.Capabilities()
	caps.Snapshot, caps.Memory = false, false
	h.caps = &caps
	h.open()
	h.create(CreateRequest{Name: "frozen", Lifecycle: Lifecycle{Idle: time.Nanosecond}})
	if sb := h.paused("frozen"); sb.Suspended != "" {
		t.Error("it was saved")
	}
	if got := h.sh("frozen", "echo awake"); got != "awake" {
		t.Errorf("it says %q", got)
	}
	h.crash()
	caps.Pause = false
	h.open()
	_, err := h.Create(context.Background(), CreateRequest{Image: HostImage, Lifecycle: Lifecycle{Idle: time.Hour}})
	wantKind(t, err, sandbox.Unsupported)
}
