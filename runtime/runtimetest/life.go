package runtimetest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

var lifeTests = []test{
	{"capabilities make sense", nil, testCapabilities},
	{"a created sandbox runs commands", nil, testCreateRuns},
	{"the list is in the order of IDs", nil, testListOrder},
	{"a taken ID is refused", nil, testDuplicate},
	{"nonsense is refused and leaves nothing", nil, testInvalidSpec},
	{"what is not declared is refused", nil, testUndeclared},
	{"an unknown ID is not found", nil, testUnknownID},
	{"destroy is idempotent and frees the ID", nil, testDestroy},
	{"destroy cuts open connections", nil, testDestroyCuts},
	{"the caller's spec is copied", nil, testSpecCopied},
	{"stats move with use", nil, testStatsMove},
	{"a canceled create leaves nothing", nil, testCanceledCreate},
}

func testCapabilities(t *testing.T, s *suite) {
	if s.Runtime.Name() == "" {
		t.Error("the runtime has no name")
	}
	c := s.caps
	if !slices.Contains(c.Roots, s.Spec.Root.Kind) {
		t.Errorf("root kind %q of the subject is not declared in %v", s.Spec.Root.Kind, c.Roots)
	}
	if !slices.Contains(c.Networks, s.Spec.Network) {
		t.Errorf("network %q of the subject is not declared in %v", s.Spec.Network, c.Networks)
	}
	if c.Memory && !c.Snapshot {
		t.Error("memory snapshots without snapshots")
	}
}

func testCreateRuns(t *testing.T, s *suite) {
	b := s.create(t)
	s.wantState(t, b.id, sandbox.Running)

	if got := b.sh("echo out; echo err >&2; exit 7"); got.Stdout != "out\n" || got.Stderr != "err\n" || got.Exit != 7 {
		t.Errorf("got %+v, want out on stdout, err on stderr, exit 7", got)
	}
	b.write("greeting", []byte("hello\n"))
	if got := b.must("cat greeting; echo more >> greeting"); got != "hello\n" {
		t.Errorf("a command reads %q from a file written through the guest", got)
	}
	if got := string(b.read("greeting")); got != "hello\nmore\n" {
		t.Errorf("the guest reads %q from a file written by a command", got)
	}
	if canIsolate(s.caps) {
		if got := strings.TrimSpace(b.must("uname -n")); got != b.id {
			t.Errorf("host name is %q, want the ID %q as nothing else was asked for", got, b.id)
		}
	}
}

func testListOrder(t *testing.T, s *suite) {
	for _, id := range []string{"m5", "a9", "z0", "a10"} {
		s.create(t, func(spec *sandbox.Spec) { spec.ID = id })
	}
	all, err := s.Runtime.List(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, st := range all {
		ids = append(ids, st.ID)
	}
	if want := []string{"a10", "a9", "m5", "z0"}; !slices.Equal(ids, want) {
		t.Errorf("List: %v, want %v", ids, want)
	}
}

func testDuplicate(t *testing.T, s *suite) {
	b := s.create(t)
	b.write("mark", []byte("mine"))
	wantKind(t, "Create", s.Runtime.Create(deadline(t), b.spec), sandbox.Exists)
	if got := string(b.read("mark")); got != "mine" {
		t.Errorf("the refused Create changed the sandbox that has the ID: %q", got)
	}
}

func testInvalidSpec(t *testing.T, s *suite) {
	bad := map[string]func(*sandbox.Spec){
		"no id":             func(spec *sandbox.Spec) { spec.ID = "" },
		"upper case id":     func(spec *sandbox.Spec) { spec.ID = "Abc" },
		"path in id":        func(spec *sandbox.Spec) { spec.ID = "../x" },
		"negative memory":   func(spec *sandbox.Spec) { spec.Resources.Memory = -1 },
		"negative disk":     func(spec *sandbox.Spec) { spec.Resources.Disk = -1 },
		"negative cpus":     func(spec *sandbox.Spec) { spec.Resources.CPUs = -0.5 },
		"negative pids":     func(spec *sandbox.Spec) { spec.Resources.Pids = -1 },
		"network w/o link":  func(spec *sandbox.Spec) { spec.Network, spec.Link = sandbox.NetworkSandbox, nil },
		"unknown network":   func(spec *sandbox.Spec) { spec.Network = "warp" },
		"unknown root kind": func(spec *sandbox.Spec) { spec.Root.Kind = "floppy" },
		"relative mount": func(spec *sandbox.Spec) {
			spec.Mounts = []sandbox.Mount{{Source: "/tmp", Target: "relative"}}
		},
	}
	for name, edit := range bad {
		t.Run(name, func(t *testing.T) {
			wantKind(t, "Create", s.Runtime.Create(deadline(t), s.spec(edit)), sandbox.Invalid, sandbox.Unsupported)
		})
	}
	if all, err := s.Runtime.List(deadline(t)); err != nil || len(all) != 0 {
		t.Errorf("after refused creates List = %v, %v; want nothing", all, err)
	}
}

func testUndeclared(t *testing.T, s *suite) {
	ctx := deadline(t)
	refuse := func(what string, err error) {
		t.Helper()
		wantKind(t, what, err, sandbox.Unsupported)
	}
	for _, kind := range []sandbox.RootKind{sandbox.RootEROFS, sandbox.RootHost, sandbox.RootRepository, sandbox.RootDisk} {
		if !slices.Contains(s.caps.Roots, kind) {
			refuse("Create with root "+string(kind), s.Runtime.Create(ctx, s.spec(func(spec *sandbox.Spec) { spec.Root.Kind = kind })))
		}
	}
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkSandbox, sandbox.NetworkHost} {
		if !slices.Contains(s.caps.Networks, mode) {
			refuse("Create with network "+string(mode), s.Runtime.Create(ctx, s.spec(func(spec *sandbox.Spec) { spec.Network = mode })))
		}
	}
	if !s.caps.Mounts {
		refuse("Create with a mount", s.Runtime.Create(ctx, s.spec(func(spec *sandbox.Spec) {
			spec.Mounts = []sandbox.Mount{{Source: t.TempDir(), Target: "/mnt"}}
		})))
	}
	b := s.create(t)
	if !s.caps.Pause {
		refuse("Pause", s.Runtime.Pause(ctx, b.id))
		refuse("Resume", s.Runtime.Resume(ctx, b.id))
	}
	if !s.caps.Snapshot {
		refuse("Snapshot", s.Runtime.Snapshot(ctx, b.id, t.TempDir(), sandbox.SnapshotOptions{}))
		refuse("Restore", s.Runtime.Restore(ctx, s.spec(), t.TempDir()))
	}
	if !s.caps.Changes {
		refuse("Changes", s.Runtime.Changes(ctx, b.id, failingWriter{}))
	}
	s.wantState(t, b.id, sandbox.Running)
}

func testUnknownID(t *testing.T, s *suite) {
	ctx, id := deadline(t), "nosuchsandbox"
	_, err := s.Runtime.Dial(ctx, id, sandbox.GuestPort)
	wantKind(t, "Dial", err, sandbox.NotFound)
	_, err = s.Runtime.Stats(ctx, id)
	wantKind(t, "Stats", err, sandbox.NotFound)
	if s.caps.Pause {
		wantKind(t, "Pause", s.Runtime.Pause(ctx, id), sandbox.NotFound)
		wantKind(t, "Resume", s.Runtime.Resume(ctx, id), sandbox.NotFound)
	}
	if s.caps.Snapshot {
		wantKind(t, "Snapshot", s.Runtime.Snapshot(ctx, id, t.TempDir(), sandbox.SnapshotOptions{}), sandbox.NotFound)
	}
	if s.caps.Changes {
		wantKind(t, "Changes", s.Runtime.Changes(ctx, id, failingWriter{}), sandbox.NotFound)
	}
	if err := s.Runtime.Destroy(ctx, id); err != nil {
		t.Errorf("Destroy of an unknown ID: %v, want no error", err)
	}
}

func testDestroy(t *testing.T, s *suite) {
	ctx := deadline(t)
	b := s.create(t)
	b.write("mark", []byte("old"))
	for range 2 {
		if err := s.Runtime.Destroy(ctx, b.id); err != nil {
			t.Fatalf("Destroy: %v", err)
		}
		s.wantGone(t, b.id)
	}
	again := s.create(t, func(spec *sandbox.Spec) { spec.ID = b.id })
	if got := again.sh("cat mark"); got.Exit == 0 {
		t.Errorf("a new sandbox with an old ID has the old one's file: %q", got.Stdout)
	}
}

func testDestroyCuts(t *testing.T, s *suite) {
	b := s.create(t)
	conn, err := s.Runtime.Dial(deadline(t), b.id, sandbox.GuestPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	cut := make(chan error, 1)
	go func() {
		var b [1]byte
		_, err := conn.Read(b[:])
		cut <- err
	}()
	select {
	case err := <-cut:
		if err == nil {
			t.Error("a destroyed sandbox sent data")
		}
	case <-deadline(t).Done():
		t.Error("a connection into a destroyed sandbox stays open")
	}
}

func testSpecCopied(t *testing.T, s *suite) {
	labels := map[string]string{"test.colour": "green"}
	b := s.create(t, func(spec *sandbox.Spec) {
		for k, v := range s.Spec.Labels {
			labels[k] = v
		}
		spec.Labels = labels
	})
	labels["test.colour"] = "red"
	st, _ := s.status(t, b.id)
	if got := st.Spec.Labels["test.colour"]; got != "green" {
		t.Errorf("label is %q after the caller changed its map, want green", got)
	}
	st.Spec.Labels["test.colour"] = "blue"
	st, _ = s.status(t, b.id)
	if got := st.Spec.Labels["test.colour"]; got != "green" {
		t.Errorf("label is %q after a reader of List changed it, want green", got)
	}
}

func testStatsMove(t *testing.T, s *suite) {
	b := s.create(t)
	before := b.stats()
	b.must("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; dd if=/dev/zero of=eight bs=1M count=8 2>/dev/null; sync")
	eventually(t, "CPU time and disk use grow", func() bool {
		after := b.stats()
		return after.CPU > before.CPU && after.Disk >= before.Disk+8<<20
	})
	if before.Memory <= 0 || before.Pids < 1 || before.Time.IsZero() {
		t.Errorf("stats of a running sandbox: %+v", before)
	}
}

func testCanceledCreate(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Runtime.Create(ctx, s.spec())
	wantKind(t, "Create with a canceled context", err, sandbox.Canceled)

	// Cancel at many moments of the way up. Whatever the outcome, error and
	// list must agree.
	for i := range 8 {
		spec := s.spec()
		ctx, cancel := context.WithTimeout(t.Context(), patience/(1<<15)*(1<<i))
		err := s.Runtime.Create(ctx, spec)
		cancel()
		_, listed := s.status(t, spec.ID)
		if (err == nil) != listed {
			t.Errorf("Create returned %v but listed is %v", err, listed)
		}
		if err != nil {
			wantKind(t, "Create", err, sandbox.Canceled, sandbox.Timeout)
		}
	}
}

// failingWriter is a reader of Changes who has hung up.
type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("the reader has gone") }
