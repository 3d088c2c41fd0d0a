package worktree

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR2.5
func TestASandboxIsReachedAndMendedWhileAForkBombHoldsItsLimit(t *testing.T) {
	r := open(t, t.TempDir())
	if !r.Capabilities().PidsLimit {
		t.Skip("needs the right to make control groups")
	}
	const limit = 200
	spec := specOf(newRepo(t))
	spec.ID, spec.Resources.Pids = "bombed", limit
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Destroy(context.Background(), spec.ID) })
	client := guest.New(func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, spec.ID, sandbox.GuestPort) }, guest.Options{})
	defer client.CloseIdle()

	bomb := "f() { while :; do f & done; }; f"
	if _, err := client.Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", "setsid sh -c '" + bomb + "' >/dev/null 2>&1 </dev/null &"}}); err != nil {
		t.Fatal(err)
	}
	pids := func() int {
		st, err := r.Stats(t.Context(), spec.ID)
		if err != nil {
			t.Fatal(err)
		}
		return st.Pids
	}
	for pids() < limit {
		time.Sleep(time.Millisecond)
	}
	for range 5 {
		out, err := client.Run(t.Context(), guest.Command{Args: []string{"/bin/echo", "reached"}})
		if err != nil || strings.TrimSpace(string(out.Stdout)) != "reached" {
			t.Fatalf("a command says %q, %v", out.Stdout, err)
		}
	}
	// A login shell forks, too. One that finds a process of the bomb just gone takes
	// its place and then has to share the limit with the rest: it is asked again.
	for try := 1; ; try++ {
		out, err := client.Run(t.Context(), guest.Command{Args: []string{"/bin/bash", "-l", "-c", "echo $(echo in a shell)"}})
		if err == nil && strings.TrimSpace(string(out.Stdout)) == "in a shell" {
			break
		}
		if err != nil || try == 5 {
			t.Fatalf("a shell says %q %q, %v", out.Stdout, out.Stderr, err)
		}
	}
	if n := pids(); n > limit {
		t.Errorf("%d processes under a limit of %d", n, limit)
	}
	// In a namespace of its own a command can kill all but itself and the agent.
	for range 10 {
		if _, err := client.Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", "kill -9 -1"}}); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := client.Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", "echo $(echo mended)"}}); err != nil || strings.TrimSpace(string(out.Stdout)) != "mended" {
		t.Errorf("after the bomb was killed a shell says %q, %v", out.Stdout, err)
	}
	if n := pids(); n >= limit/2 {
		t.Errorf("%d processes are left of the bomb", n)
	}
}

func TestNoControlGroupIsLeftByARuntimeWithoutSandboxes(t *testing.T) {
	bad := t.TempDir()
	put(t, bad, "s/broken/immovable/x", "")
	for _, dir := range []string{t.TempDir(), bad} {
		r, err := New(Config{Dir: dir, Guest: guesttest.Binary(t)})
		if err != nil {
			t.Skipf("no privilege: %v", err)
		}
		if r.cgroups == nil {
			t.Skip("needs the right to make control groups")
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		for _, dir := range r.cgroups.hierarchies() {
			if _, err := os.Stat(filepath.Join(dir, r.cgroups.prefix)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %v", dir, err)
			}
		}
	}
}
