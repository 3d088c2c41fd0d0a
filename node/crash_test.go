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

// conformance: NFR3.3
func TestSandboxesSurviveACrashOfTheNode(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "survivor", Ports: []Port{{Guest: sandbox.GuestPort}}})
	h.sh("survivor", "echo here > note")
	h.create(CreateRequest{Name: "sleeper"})
	if _, err := h.Pause(ctx, "sleeper", PauseDisk); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.open()
	if got := h.sh("survivor", "cat note"); got != "here" {
		t.Errorf("it has %q", got)
	}
	again, err := h.Get(ctx, "survivor")
	if err != nil || again.Ports[0] != sb.Ports[0] {
		t.Errorf("ports changed from %v to %v, %v", sb.Ports, again.Ports, err)
	}
	c, err := net.Dial("tcp", net.JoinHostPort(sb.Ports[0].HostIP, fmt.Sprint(sb.Ports[0].Host)))
	if err != nil {
		t.Errorf("its port was not published again: %v", err)
	} else {
		c.Close()
	}
	if _, err := h.Resume(ctx, "sleeper"); err != nil {
		t.Errorf("the paused one does not resume: %v", err)
	}
}

func TestAMachineThatDiedMeanwhileIsReportedLost(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{Name: "unlucky"})
	h.crash()
	h.world.Kill(sb.ID, "power cut")
	h.open()
	got, err := h.Get(ctx, "unlucky")
	if err != nil || got.State != sandbox.Error || got.Reason == "" {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := h.Remove(ctx, "unlucky"); err != nil {
		t.Error(err)
	}
}

// Each case is what lies on disk and in the runtime when the process dies at
// one step of an operation; after the next start there is the old state or the
// new one, and nothing else.
func TestEveryInterruptedStepIsRepaired(t *testing.T) {
	for name, tc := range map[string]struct {
		edit    func(h *host, rec *Sandbox) // turns a running sandbox into the interrupted one
		want    sandbox.State               // empty: no record is left
		machine bool
	}{
		"creating, the machine exists":     {func(_ *host, r *Sandbox) { r.State = sandbox.Creating }, "", false},
		"creating, the machine does not":   {func(h *host, r *Sandbox) { r.State = sandbox.Creating; h.destroy(r.ID) }, "", false},
		"removing, the machine exists":     {func(_ *host, r *Sandbox) { r.State = sandbox.Terminating }, sandbox.Terminated, false},
		"removing, the machine is gone":    {func(h *host, r *Sandbox) { r.State = sandbox.Terminating; h.destroy(r.ID) }, sandbox.Terminated, false},
		"paused on disk, machine still up": {func(h *host, r *Sandbox) { h.suspend(r) }, sandbox.Paused, false},
		"running, nothing interrupted":     {func(*host, *Sandbox) {}, sandbox.Running, true},
	} {
		t.Run(name, func(t *testing.T) {
			h, ctx := newHost(t), context.Background()
			rec := h.create(CreateRequest{Name: "x"})
			tc.edit(h, &rec)
			if err := h.store.put(ctx, kindSandbox, rec.ID, rec); err != nil {
				t.Fatal(err)
			}
			h.crash()
			h.open()
			got, err := h.Get(ctx, rec.ID)
			if tc.want == "" {
				wantKind(t, err, sandbox.NotFound)
			} else if err != nil || got.State != tc.want {
				t.Errorf("it is %s, %v; want %s", got.State, err, tc.want)
			}
			if n := len(h.machines()); (n == 1) != tc.machine {
				t.Errorf("%d machines", n)
			}
			if tc.want == sandbox.Paused {
				if _, err := h.Resume(ctx, rec.ID); err != nil {
					t.Errorf("it does not resume: %v", err)
				}
			}
		})
	}
}

func TestMachinesWithoutARecordAreRemoved(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	rec := h.create(CreateRequest{})
	if err := h.store.delete(ctx, kindSandbox, rec.ID); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.open()
	if m := h.machines(); len(m) != 0 {
		t.Errorf("left: %v", m)
	}
}

func TestARemovalThatFailsIsTriedAgain(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	rec := h.create(CreateRequest{Name: "sticky"})
	h.world.Inject(fake.Fault{Op: "Destroy", Kind: sandbox.Unavailable, Times: 1})
	if err := h.Remove(ctx, "sticky"); err == nil {
		t.Fatal("the fault did not strike")
	}
	if h.state(rec.ID) != sandbox.Terminating {
		t.Fatalf("it is %s", h.state(rec.ID))
	}
	h.reconcile(ctx)
	if len(h.machines()) != 0 || h.state(rec.ID) != sandbox.Terminated {
		t.Errorf("machines %v, it is %s", h.machines(), h.state(rec.ID))
	}
}

func TestASandboxMadeDuringReconcilingIsNotTakenForLost(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.create(CreateRequest{Name: "young"})
	// What the runtime said before the sandbox existed.
	h.carryOut(ctx, observed{"fake": {}})
	if h.state("young") != sandbox.Running {
		t.Errorf("it is %s", h.state("young"))
	}
}

func TestAFaultyRuntimeNeverLeavesMachinesBehind(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.world.Chaos(7, 0.2, "Create", "Restore", "Snapshot", "Dial")
	for i := range 20 {
		sb, err := h.Create(ctx, CreateRequest{Image: HostImage})
		if err != nil {
			continue
		}
		switch i % 3 {
		case 0:
			_, _ = h.Pause(ctx, sb.ID, PauseDisk)
			_, _ = h.Resume(ctx, sb.ID)
		case 1:
			_, _ = h.Fork(ctx, sb.ID, 2, CreateRequest{})
		}
	}
	h.world.Chaos(0, 0)
	live, err := h.List(ctx, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sb := range live {
		if err := h.Remove(ctx, sb.ID); err != nil {
			t.Error(err)
		}
	}
	h.reconcile(ctx)
	if m, s := h.machines(), h.cfg.Snapshots.List(); len(m) != 0 || len(s) != 0 {
		t.Errorf("left: machines %v, snapshots %v", m, s)
	}
}

func TestAFloodOfEventsKeepsTheNewest(t *testing.T) {
	hub := newHub()
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	ch := hub.watch(ctx, 0)
	const count = 3 * eventsQueued
	for range count {
		hub.publish(sandbox.Event{})
	}
	last := uint64(0)
	for last < count {
		e, ok := <-ch
		if !ok || e.Seq <= last {
			t.Fatalf("event %d after %d, %v", e.Seq, last, ok)
		}
		last = e.Seq
	}
}

func (h *host) destroy(id string) {
	h.t.Helper()
	if err := h.runtimes["fake"].Destroy(context.Background(), id); err != nil {
		h.t.Fatal(err)
	}
}

// suspend saves the record's machine to disk but leaves it running.
func (h *host) suspend(r *Sandbox) {
	h.t.Helper()
	s, err := h.takeSnapshot(context.Background(), *r, Snapshot{Auto: autoPause})
	if err != nil {
		h.t.Fatal(err)
	}
	r.State, r.Suspended = sandbox.Paused, s.ID
}

func (h *host) machines() []sandbox.Status {
	h.t.Helper()
	list, err := h.runtimes["fake"].List(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

// conformance: FR5.2
func TestASandboxThatWasStoppedOffTheRecordGoesOn(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{})
	r, err := h.Runtime(sb.Runtime)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Pause(ctx, sb.ID); err != nil { // what a pause, a snapshot or a move does first
		t.Fatal(err)
	}
	h.crash()
	h.open()
	if got := h.sh(sb.ID, "echo alive"); got != "alive" {
		t.Errorf("it says %q", got)
	}
}
