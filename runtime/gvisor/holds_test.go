package gvisor_test

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// A snapshot of one node names by digest what another of the same version has by itself, so that it is not sent.
func TestWhatASnapshotHasOfItsVersionEveryNodeHas(t *testing.T) {
	here, there := open(t, t.TempDir()), open(t, t.TempDir())
	t.Cleanup(func() { must(t, here.Close()); must(t, there.Close()) })
	spec := sandbox.Spec{ID: "h1", Root: sandbox.Root{Kind: sandbox.RootHost}, Network: sandbox.NetworkNone}
	must(t, here.Create(t.Context(), spec))
	t.Cleanup(func() { _ = here.Destroy(t.Context(), "h1") })
	state := t.TempDir()
	must(t, here.Snapshot(t.Context(), "h1", state, sandbox.SnapshotOptions{}))
	images, err := filepath.Glob(filepath.Join(state, "*.erofs"))
	if err != nil || len(images) == 0 {
		t.Fatalf("the snapshot has the images %v: %v", images, err)
	}
	for range 2 { // the second time from memory
		held := there.Holds()
		for _, path := range images {
			data, err := os.ReadFile(path)
			must(t, err)
			sum := blake3.Sum256(data)
			if got := held["blake3:"+hex.EncodeToString(sum[:])]; filepath.Base(got) != filepath.Base(path) {
				t.Errorf("image %s is held as %q", filepath.Base(path), got)
			}
		}
	}
}
