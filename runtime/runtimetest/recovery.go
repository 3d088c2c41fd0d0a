package runtimetest

import (
	"context"
	"reflect"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

var recoveryTests = []test{
	{"a runtime opened anew finds its sandboxes", nil, testReopen},
	{"a runtime opened anew removes without a trace", nil, testReopenDestroy},
	{"a paused sandbox is found paused", func(c sandbox.Capabilities) bool { return c.Pause && c.Persistent }, testReopenPaused},
	{"a death is told", nil, testDeath},
	{"a death while nobody watched is found", nil, testDeathUnseen},
	{"watch ends with its context", nil, testWatchEnds},
}

func testReopen(t *testing.T, s *suite) {
	b := s.create(t, func(spec *sandbox.Spec) { spec.Labels = withLabel(spec.Labels, "test.mark", "kept") })
	b.write("mark", []byte("kept"))
	c := b.startCounter()
	pid := c.ask(1)

	s.Runtime = s.Reopen(t)
	b.rt = s.Runtime
	st, ok := s.status(t, b.id)
	if !ok {
		t.Fatal("the sandbox is not listed")
	}
	if !reflect.DeepEqual(st.Spec, b.spec) {
		t.Errorf("the spec came back as\n%+v\nwant\n%+v", st.Spec, b.spec)
	}
	if !s.caps.Persistent {
		if st.State != sandbox.Error || st.Reason == "" {
			t.Errorf("a lost sandbox is %s (%q), want error with a reason", st.State, st.Reason)
		}
		_, err := s.Runtime.Dial(deadline(t), b.id, sandbox.GuestPort)
		wantKind(t, "Dial", err, sandbox.Conflict)
		return
	}
	s.wantState(t, b.id, sandbox.Running)
	if got := string(b.read("mark")); got != "kept" {
		t.Errorf("mark is %q", got)
	}
	if again := c.ask(2); again != pid {
		t.Errorf("process %s became %s", pid, again)
	}
	if s.caps.Snapshot {
		dir := b.snapshot(sandbox.SnapshotOptions{})
		if got := string(s.restore(t, b, dir).read("mark")); got != "kept" {
			t.Errorf("mark is %q in a fork of a sandbox that was found again", got)
		}
	}
	wantKind(t, "Create", s.Runtime.Create(deadline(t), b.spec), sandbox.Exists)
}

func testReopenDestroy(t *testing.T, s *suite) {
	b := s.create(t)
	s.Runtime = s.Reopen(t)
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantGone(t, b.id)
	s.create(t, func(spec *sandbox.Spec) { spec.ID = b.id }).must("true")
}

func testReopenPaused(t *testing.T, s *suite) {
	b := s.create(t)
	if err := s.Runtime.Pause(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.Runtime = s.Reopen(t)
	b.rt = s.Runtime
	s.wantState(t, b.id, sandbox.Paused)
	if err := s.Runtime.Resume(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	b.must("true")
}

func testDeath(t *testing.T, s *suite) {
	events, also := s.Runtime.Watch(deadline(t)), s.Runtime.Watch(deadline(t))
	victim, other := s.create(t), s.create(t)
	s.Kill(t, victim.id)
	for _, ch := range []<-chan sandbox.Event{events, also} {
		e := waitEvent(t, ch, victim.id, func(e sandbox.Event) bool { return e.State == sandbox.Error })
		if e.Reason == "" || e.Time.IsZero() {
			t.Errorf("the event %+v lacks its reason or time", e)
		}
	}
	s.wantDead(t, victim)
	other.must("true")
}

func testDeathUnseen(t *testing.T, s *suite) {
	b := s.create(t)
	s.Kill(t, b.id)
	s.Runtime = s.Reopen(t)
	b.rt = s.Runtime
	s.wantDead(t, b)
}

// wantDead fails unless b is in the Error state, refuses and can be removed.
func (s *suite) wantDead(t *testing.T, b *box) {
	t.Helper()
	eventually(t, "the dead sandbox is in the Error state", func() bool {
		st, ok := s.status(t, b.id)
		return ok && st.State == sandbox.Error && st.Reason != ""
	})
	_, err := s.Runtime.Dial(deadline(t), b.id, sandbox.GuestPort)
	wantKind(t, "Dial", err, sandbox.Conflict)
	if s.caps.Pause {
		wantKind(t, "Pause", s.Runtime.Pause(deadline(t), b.id), sandbox.Conflict)
		wantKind(t, "Resume", s.Runtime.Resume(deadline(t), b.id), sandbox.Conflict)
	}
	if s.caps.Snapshot {
		wantKind(t, "Snapshot", s.Runtime.Snapshot(deadline(t), b.id, t.TempDir(), sandbox.SnapshotOptions{}), sandbox.Conflict)
	}
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantGone(t, b.id)
}

func testWatchEnds(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(t.Context())
	events := s.Runtime.Watch(ctx)
	cancel()
	end := deadline(t)
	for {
		select {
		case _, open := <-events:
			if !open {
				return
			}
		case <-end.Done():
			t.Fatal("the channel stays open after its context ended")
		}
	}
}

// waitEvent reads events until one about id satisfies match.
func waitEvent(t *testing.T, events <-chan sandbox.Event, id string, match func(sandbox.Event) bool) sandbox.Event {
	t.Helper()
	end := deadline(t)
	for {
		select {
		case e, open := <-events:
			if !open {
				t.Fatal("the channel of events was closed")
			}
			if e.Sandbox == id && match(e) {
				return e
			}
		case <-end.Done():
			t.Fatal("the event did not come")
		}
	}
}

func withLabel(labels map[string]string, key, value string) map[string]string {
	with := map[string]string{key: value}
	for k, v := range labels {
		with[k] = v
	}
	return with
}
