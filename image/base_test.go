package image

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// buildBase makes the template in a store of its own, whose directory is dir.
func buildBase(t *testing.T, dir string) Image {
	t.Helper()
	if testing.Short() {
		t.Skip("downloads packages")
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("mmdebstrap is not installed")
	}
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	i, err := s.EnsureBase(context.Background(), func(p Progress) { t.Logf("%6.1fs %s", time.Since(start).Seconds(), p.Stage) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: FR2.2 base from packages in %.0f s, %d MB", time.Since(start).Seconds(), i.Size>>20)
	start = time.Now()
	if again, err := s.EnsureBase(context.Background(), nil); err != nil || again.Root != i.Root || time.Since(start) > 5*time.Second {
		t.Errorf("built again: %v", err)
	}
	return i
}

// The same packages must give the same root, in any store at any time.
//
// conformance: FR2.2
func TestBaseIsReproducible(t *testing.T) {
	first, second := t.TempDir(), t.TempDir()
	a, b := buildBase(t, first), buildBase(t, second)
	text := rootDescription(t, a)
	for _, want := range []string{
		"/home/user 40", "/etc/sudoers.d/user 100440 0:0 ", "/usr/bin/sudo 104755 0:0 ", "/usr/bin/bash 100755 ", "/usr/bin/python 120777 ",
		"/usr/bin/git 100755 ", "/usr/bin/curl 100755 ", "/usr/bin/ss 100755 ", "/usr/bin/apt-get 100755 ", "/usr/sbin/useradd 100755 ",
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the template has no %q", want)
		}
	}
	if a.Root.Digest != b.Root.Digest {
		sameTree(t, rootDescription(t, b), rootDescription(t, a))
		t.Errorf("roots %s and %s", a.Root.Digest, b.Root.Digest)
	}
}

func openStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOldBaseIsUsedWhenMirrorFails(t *testing.T) {
	if _, err := hostDistribution(); err != nil {
		t.Skip(err)
	}
	s := openStore(t)
	old := importText(t, s, BaseName, "old")
	t.Setenv("PATH", t.TempDir()) // no mmdebstrap
	if i, err := s.EnsureBase(t.Context(), nil); err != nil || i.ID != old.ID {
		t.Errorf("an imported base: %+v, %v", i, err)
	}
	old.Key = "debian:older"
	if _, err := s.addNames("test", old, []string{BaseName}); err != nil {
		t.Fatal(err)
	}
	if i, err := s.EnsureBase(t.Context(), nil); err != nil || i.Root != old.Root {
		t.Errorf("an older base: %+v, %v", i, err)
	}
	if err := s.Remove(BaseName); err != nil {
		t.Fatal(err)
	}
	if _, err := s.EnsureBase(t.Context(), nil); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("no base: %v", err)
	}
}
