package fake

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

func newSpec() sandbox.Spec {
	return sandbox.Spec{ID: sandbox.NewID(), Root: sandbox.Root{Kind: sandbox.RootHost}, Network: sandbox.NetworkHost}
}

func TestAFaultHitsTheCallsItLiesInWaitFor(t *testing.T) {
	w := newWorld(t)
	r := w.Open(Config{})
	w.Inject(Fault{Op: "Create", Skip: 1, Times: 2, Kind: sandbox.Exhausted})
	var kinds []sandbox.Kind
	for range 4 {
		kinds = append(kinds, sandbox.KindOf(r.Create(t.Context(), newSpec())))
	}
	if want := []sandbox.Kind{"", sandbox.Exhausted, sandbox.Exhausted, ""}; !slices.Equal(kinds, want) {
		t.Errorf("creates ended with %q, want %q", kinds, want)
	}
	if all, err := r.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("List: %d sandboxes, %v; want those two that came up", len(all), err)
	}
}

func TestADelayEndsWithItsCaller(t *testing.T) {
	w := newWorld(t)
	w.Inject(Fault{Op: "List", Delay: time.Hour})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := w.Open(Config{}).List(ctx); !sandbox.Is(err, sandbox.Timeout) {
		t.Errorf("List: %v, want a timeout", err)
	}
}

func TestASandboxCanDieOfACall(t *testing.T) {
	w := newWorld(t)
	r := w.Open(Config{})
	spec := newSpec()
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	events := r.Watch(t.Context())
	w.Inject(Fault{Op: "Stats", Sandbox: spec.ID, Times: 1, Die: true})
	if _, err := r.Stats(t.Context(), spec.ID); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("Stats: %v, want conflict with the dead sandbox", err)
	}
	if e := <-events; e.Sandbox != spec.ID || e.State != sandbox.Error {
		t.Errorf("the event is %+v", e)
	}
}

func TestAConnectionCanBeCut(t *testing.T) {
	w := newWorld(t)
	r := w.Open(Config{})
	spec := newSpec()
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	w.Serve(spec.ID, 80, func(c net.Conn) {
		_, _ = io.WriteString(c, "0123456789")
		_ = c.Close()
	})
	read := func() string {
		c, err := r.Dial(t.Context(), spec.ID, 80)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if len(got) < 10 != errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q ended with %v", got, err)
		}
		return string(got)
	}
	if got := read(); got != "0123456789" {
		t.Errorf("the registered server sent %q", got)
	}
	w.Inject(Fault{Op: "Dial", Cut: 4})
	if got := read(); got != "0123" {
		t.Errorf("cut after four bytes, %q came through", got)
	}
}

func TestChaosIsTheSameForTheSameSeed(t *testing.T) {
	w := newWorld(t)
	r := w.Open(Config{})
	run := func(seed uint64) (failed []int) {
		w.Chaos(seed, 0.3, "List")
		for i := range 200 {
			if _, err := r.List(t.Context()); err != nil {
				failed = append(failed, i)
			}
		}
		return failed
	}
	first, again, other := run(1), run(1), run(2)
	if !slices.Equal(first, again) || slices.Equal(first, other) {
		t.Error("failures do not follow the seed")
	}
	if len(first) < 30 || len(first) > 90 {
		t.Errorf("%d of 200 calls failed at a rate of 0.3", len(first))
	}
}

func TestCapabilitiesThatAreTakenAwayAreRefused(t *testing.T) {
	w := newWorld(t)
	caps := sandbox.Capabilities{
		Isolation: sandbox.IsolationMachine,
		Roots:     []sandbox.RootKind{sandbox.RootHost}, Networks: []sandbox.NetworkMode{sandbox.NetworkHost},
	}
	r := w.Open(Config{Name: "plain", Capabilities: &caps})
	spec := newSpec()
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if r.Name() != "plain" || r.Capabilities().Isolation != sandbox.IsolationMachine {
		t.Errorf("%s declares %+v", r.Name(), r.Capabilities())
	}
	if err := r.Pause(t.Context(), spec.ID); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("Pause: %v, want unsupported", err)
	}
}
