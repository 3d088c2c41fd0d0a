// Package runtimetest is the suite of tests that every runtime passes: it holds
// a sandbox.Runtime to each sentence of its contract. Capabilities decide which
// tests apply, and a call that they do not promise must answer Unsupported.
//
// The sandboxes under test need a POSIX shell with the usual tools (seq, dd,
// od, mkfifo, setsid) and nothing else; tests that want more look for it and
// skip.
package runtimetest

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Subject is one runtime under test, alone in its directory.
type Subject struct {
	// Runtime is the runtime under test. The suite closes it.
	Runtime sandbox.Runtime

	// Spec is a spec that works, without an ID. The suite changes Resources
	// and, for tests of refusal, other fields.
	Spec sandbox.Spec

	// Dir is the absolute path inside where tests work; empty: where commands
	// start and relative names lead without anything said.
	Dir string

	// Reopen opens another Runtime on the same directory, the one before having
	// been abandoned without Close, as by a crash.
	Reopen func(t *testing.T) sandbox.Runtime

	// Kill ends a sandbox from outside, as the kernel's out-of-memory killer
	// would.
	Kill func(t *testing.T, id string)

	// Removable is an absolute path that exists in the root and that a sandbox
	// may remove. Empty when the root has none: whiteouts are not tested then.
	Removable string

	// Traces lists what the runtime's sandboxes have on the host at this
	// moment: processes, mounts, cgroups, directories. After every test the
	// list must be what it was before. Nil when there is nothing to list.
	Traces func(t *testing.T) []string
}

// patience bounds every single call, so that a hang is a failure. It is far
// above what any call takes, even on a loaded machine.
const patience = 2 * time.Minute

// Run runs the whole suite. Each test opens a fresh Subject.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	for _, group := range []struct {
		name  string
		tests []test
	}{
		{"life", lifeTests},
		{"dial", dialTests},
		{"pause", pauseTests},
		{"snapshot", snapshotTests},
		{"live", liveTests},
		{"changes", changesTests},
		{"limits", limitTests},
		{"isolation", isolationTests},
		{"recovery", recoveryTests},
		{"crowd", crowdTests},
	} {
		t.Run(group.name, func(t *testing.T) {
			for _, tc := range group.tests {
				t.Run(tc.name, func(t *testing.T) { runOne(t, open, tc) })
			}
		})
	}
}

// test is one test and the capabilities without which it does not apply.
type test struct {
	name    string
	applies func(sandbox.Capabilities) bool // nil: always
	run     func(t *testing.T, s *suite)
}

// suite is what a test works with: a subject and the sandboxes made so far.
type suite struct {
	Subject
	caps sandbox.Capabilities
	open func(t *testing.T) Subject
}

func runOne(t *testing.T, open func(t *testing.T) Subject, tc test) {
	s := &suite{Subject: open(t), open: open}
	t.Cleanup(func() {
		if err := s.Runtime.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	s.caps = s.Runtime.Capabilities()
	if tc.applies != nil && !tc.applies(s.caps) {
		t.Skipf("%s does not declare what this test is about", s.Runtime.Name())
	}
	if s.Traces != nil {
		before := s.Traces(t)
		t.Cleanup(func() {
			after := s.Traces(t)
			for _, trace := range after {
				if !slices.Contains(before, trace) {
					t.Errorf("left behind on the host: %s", trace)
				}
			}
		})
	}
	// Registered last, so it runs first: every sandbox goes, even those of a
	// failed test.
	t.Cleanup(func() { s.destroyAll(t) })
	tc.run(t, s)
}

func (s *suite) destroyAll(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	all, err := s.Runtime.List(ctx)
	if err != nil {
		t.Errorf("List: %v", err)
	}
	for _, st := range all {
		if err := s.Runtime.Destroy(ctx, st.ID); err != nil {
			t.Errorf("Destroy %s: %v", st.ID, err)
		}
	}
}

// spec returns the subject's spec with a fresh ID, changed by the edits.
func (s *suite) spec(edits ...func(*sandbox.Spec)) sandbox.Spec {
	spec := s.Spec
	spec.ID = sandbox.NewID()
	for _, edit := range edits {
		edit(&spec)
	}
	return spec
}

// create makes a sandbox that must come up.
func (s *suite) create(t *testing.T, edits ...func(*sandbox.Spec)) *box {
	t.Helper()
	spec := s.spec(edits...)
	if err := s.Runtime.Create(deadline(t), spec); err != nil {
		t.Fatalf("Create: %v", err)
	}
	return s.box(t, spec)
}

// box returns the sandbox of a spec.
func (s *suite) box(t *testing.T, spec sandbox.Spec) *box {
	return &box{t: t, rt: s.Runtime, id: spec.ID, dir: s.Dir, spec: spec}
}

// status returns what List says of id; ok is false when it is not listed.
func (s *suite) status(t *testing.T, id string) (st sandbox.Status, ok bool) {
	t.Helper()
	all, err := s.Runtime.List(deadline(t))
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	i := slices.IndexFunc(all, func(st sandbox.Status) bool { return st.ID == id })
	if i < 0 {
		return sandbox.Status{}, false
	}
	return all[i], true
}

// wantState fails unless List reports id in the state.
func (s *suite) wantState(t *testing.T, id string, want sandbox.State) {
	t.Helper()
	st, ok := s.status(t, id)
	if !ok {
		t.Fatalf("%s is not listed, want it %s", id, want)
	}
	if st.State != want {
		t.Fatalf("%s is %s (%s), want %s", id, st.State, st.Reason, want)
	}
}

// wantGone fails if anything of id is left.
func (s *suite) wantGone(t *testing.T, id string) {
	t.Helper()
	if st, ok := s.status(t, id); ok {
		t.Errorf("%s is still listed as %s", id, st.State)
	}
	_, err := s.Runtime.Dial(deadline(t), id, sandbox.GuestPort)
	wantKind(t, "Dial", err, sandbox.NotFound)
}

// wantKind fails unless err is an *sandbox.Err of the kind that names its operation.
func wantKind(t *testing.T, what string, err error, kinds ...sandbox.Kind) {
	t.Helper()
	if err == nil {
		t.Fatalf("%s succeeded, want %v", what, kinds)
	}
	var e *sandbox.Err
	if !errors.As(err, &e) {
		t.Fatalf("%s: error %q is a %T, want an *sandbox.Err", what, err, err)
	}
	if e.Op == "" {
		t.Errorf("%s: error %q names no operation", what, err)
	}
	if !slices.Contains(kinds, sandbox.KindOf(err)) {
		t.Fatalf("%s: %v (kind %s), want %v", what, err, sandbox.KindOf(err), kinds)
	}
}

// deadline returns a context that ends with the test or with our patience.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until cond holds; it fails when our patience ends first.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("did not come about: %s", what)
}

// The conditions under which tests apply.
func canPause(c sandbox.Capabilities) bool    { return c.Pause }
func canSnapshot(c sandbox.Capabilities) bool { return c.Snapshot }
func canMemory(c sandbox.Capabilities) bool   { return c.Snapshot && c.Memory }
func canChanges(c sandbox.Capabilities) bool  { return c.Changes }
func canIsolate(c sandbox.Capabilities) bool  { return c.Isolation.AtLeast(sandbox.IsolationProcess) }
