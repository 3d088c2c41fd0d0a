package node

import (
	"context"
	"testing"
	"time"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
)

// poolTemplate makes a template whose image is the host, which needs no file.
func (h *host) poolTemplate() Template {
	h.t.Helper()
	now := time.Now().UTC()
	b := Build{ID: sandbox.NewID(), State: BuildReady, Created: now, Image: image.HostName}
	t := Template{ID: "ready", Names: []string{"ready"}, Builds: []Build{b}, Created: now}
	if err := h.putTemplate(context.Background(), t); err != nil {
		h.t.Fatal(err)
	}
	return t
}

// filled waits until the pool of a template has its size.
func (h *host) filled(template string, size int) {
	h.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if len(h.pooled(poolKey{template, "fake"})) == size {
			return
		}
	}
	h.t.Fatalf("the pool has %d, not %d", len(h.pooled(poolKey{template, "fake"})), size)
}

// conformance: FR4.1
func TestAClaimedSandboxIsTheOneThatWaitedAndKnowsWhoItIs(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	tpl := h.poolTemplate()
	if err := h.SetPool(ctx, "ready", 2); err != nil {
		t.Fatal(err)
	}
	h.filled(tpl.ID, 2)
	if l, err := h.List(ctx, Filter{All: true}); err != nil || len(l) != 0 {
		t.Errorf("those that wait are listed: %v, %v", l, err)
	}
	waiting := map[string]bool{}
	for _, r := range h.pooled(poolKey{tpl.ID, "fake"}) {
		waiting[r.ID] = true
	}
	sb, err := h.Create(ctx, CreateRequest{Image: "ready", Name: "mine", Secure: true, Runtimes: []string{"fake"}, Env: map[string]string{"WHO": "me"}})
	if err != nil || !waiting[sb.ID] || sb.Name != "mine" || sb.Pooled != "" {
		t.Fatalf("%+v, %v", sb, err)
	}
	if got := h.sh("mine", "echo $WHO"); got != "me" {
		t.Errorf("it is %q", got)
	}
	fresh, err := h.Create(ctx, CreateRequest{Image: "ready", Fresh: true})
	if err != nil || waiting[fresh.ID] {
		t.Errorf("asked for a fresh one and got %v, %v", fresh.ID, err)
	}
	other, err := h.Create(ctx, CreateRequest{Image: "ready", Resources: sandbox.Resources{Memory: 64 << 20}})
	if err != nil || waiting[other.ID] {
		t.Errorf("asked for other resources and got %v, %v", other.ID, err)
	}
	h.filled(tpl.ID, 2)
}

func TestAPoolSurvivesACrashAndShrinks(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	tpl := h.poolTemplate()
	if err := h.SetPool(ctx, tpl.ID, 2); err != nil {
		t.Fatal(err)
	}
	h.filled(tpl.ID, 2)
	h.crash()
	h.open()
	if got := len(h.pooled(poolKey{tpl.ID, "fake"})); got != 2 {
		t.Errorf("%d of 2 were adopted", got)
	}
	if err := h.SetPool(ctx, tpl.ID, 0); err != nil {
		t.Fatal(err)
	}
	h.filled(tpl.ID, 0)
	for end := time.Now().Add(20 * time.Second); len(h.machines()) > 0 && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
	}
	if m := h.machines(); len(m) != 0 {
		t.Errorf("left: %v", m)
	}
}

func TestDemandSize(t *testing.T) {
	now := time.Unix(1e9, 0)
	ago := func(d ...time.Duration) (out []time.Time) {
		for _, d := range d {
			out = append(out, now.Add(-d))
		}
		return out
	}
	for _, c := range []struct {
		claims []time.Time
		want   int
	}{
		{nil, 0},
		{ago(time.Second), 2},
		{ago(time.Minute), 1},
		{ago(time.Minute, 3*time.Second, time.Second), 3},
		{ago(4*time.Second, 3*time.Second, 2*time.Second, time.Second), 3},
		{ago(demandKept), 0},
	} {
		if got := demandSize(c.claims, now, 3); got != c.want {
			t.Errorf("after %v: %d, not %d", c.claims, got, c.want)
		}
	}
}

func TestMachinesOfATemplateInDemandAreMadeAhead(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	h.crash()
	caps := fake.Capabilities()
	caps.Isolation = sandbox.IsolationMachine
	h.caps, h.prewarm = &caps, 3
	h.open()
	tpl := h.poolTemplate()
	if _, err := h.Create(ctx, CreateRequest{Image: "ready", Resources: sandbox.Resources{Memory: 64 << 20}}); err != nil {
		t.Fatal(err)
	}
	h.create(CreateRequest{Name: "of-an-image"})
	if p := h.Pools(); len(p) != 0 {
		t.Errorf("made for what no pool can give: %+v", p)
	}
	first := h.create(CreateRequest{Image: "ready"})
	h.filled(tpl.ID, 2)
	waiting := h.pooled(poolKey{tpl.ID, "fake"})
	second := h.create(CreateRequest{Image: "ready"})
	if second.ID != waiting[0].ID || first.ID == second.ID {
		t.Errorf("%s was not claimed from %v", second.ID, waiting)
	}
	h.filled(tpl.ID, 3)
	h.crash()
	h.open()
	h.filled(tpl.ID, 0)
}
