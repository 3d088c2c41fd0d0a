package gvisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if IsReexec() {
		Main()
	}
	os.Exit(m.Run())
}

func TestSmoke(t *testing.T) {
	guest := filepath.Join(t.TempDir(), "guest")
	cmd := exec.Command("go", "build", "-o", guest, "github.com/atoll-run/atoll/cmd/atoll-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r, err := New(Config{Dir: t.TempDir(), Guest: guest, Debug: os.Getenv("GVDEBUG")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	root := os.Getenv("GVROOT")
	if root == "" {
		root = r.agent.path
	}
	spec := sandbox.Spec{ID: "a1", Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: root}, Network: sandbox.NetworkNone}
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	st, err := r.Stats(t.Context(), "a1")
	t.Log(st, err)
	snap := t.TempDir()
	if err := r.Snapshot(t.Context(), "a1", snap, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	spec.ID = "a2"
	if err := r.Restore(t.Context(), spec, snap); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a1", "a2"} {
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
}
