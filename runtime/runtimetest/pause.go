package runtimetest

import (
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

var pauseTests = []test{
	{"a paused sandbox stands still and goes on where it was", canPause, testPauseKeepsState},
	{"pause and resume are idempotent", canPause, testPauseIdempotent},
	{"a paused sandbox can be destroyed", canPause, testPauseDestroy},
}

func testPauseKeepsState(t *testing.T, s *suite) {
	b := s.create(t)
	c := b.startCounter()
	pid := c.ask(1)
	b.must("setsid sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null &")

	if err := s.Runtime.Pause(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, b.id, sandbox.Paused)
	_, err := s.Runtime.Dial(deadline(t), b.id, sandbox.GuestPort)
	wantKind(t, "Dial", err, sandbox.Conflict)

	// The busy loop would take all of a core. A little is left for what is
	// accounted late.
	before := b.stats()
	time.Sleep(time.Second)
	if used := b.stats().CPU - before.CPU; used > 300*time.Millisecond {
		t.Errorf("a paused sandbox used %v of CPU in a second", used)
	}

	if err := s.Runtime.Resume(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, b.id, sandbox.Running)
	if again := c.ask(2); again != pid {
		t.Errorf("process %s became %s over a pause", pid, again)
	}
}

func testPauseIdempotent(t *testing.T, s *suite) {
	b := s.create(t)
	steps := []struct {
		name string
		do   func() error
		want sandbox.State
	}{
		{"resume a running one", func() error { return s.Runtime.Resume(deadline(t), b.id) }, sandbox.Running},
		{"pause", func() error { return s.Runtime.Pause(deadline(t), b.id) }, sandbox.Paused},
		{"pause again", func() error { return s.Runtime.Pause(deadline(t), b.id) }, sandbox.Paused},
		{"resume", func() error { return s.Runtime.Resume(deadline(t), b.id) }, sandbox.Running},
		{"resume again", func() error { return s.Runtime.Resume(deadline(t), b.id) }, sandbox.Running},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		s.wantState(t, b.id, step.want)
	}
	b.must("true")
}

func testPauseDestroy(t *testing.T, s *suite) {
	b := s.create(t)
	if err := s.Runtime.Pause(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantGone(t, b.id)
}
