package daemon

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// shareKernels makes a home take the kernels of machines from where other tests keep theirs.
func shareKernels(t testing.TB, h Home) {
	t.Helper()
	user, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	kernels := filepath.Join(user, "atoll-test", "kernel")
	for _, dir := range []string{kernels, h.Machines()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(kernels, filepath.Join(h.Machines(), "kernel")); err != nil {
		t.Fatal(err)
	}
}

// conformance: V3
func TestWhoIsConnectedMissesNothingWhenAMachineMovesLive(t *testing.T) {
	testConnected(t, microvm.Name)
}

// idleMove bounds what an idle machine takes in all where what it was made of is held, in bytes.
const idleMove = 1 << 20

// conformance: V3
func TestAnIdleMachineMovesLiveInFewBytes(t *testing.T) {
	ctx := t.Context()
	a, b, _ := twoNodes(t, microvm.Name)
	if _, err := a.ImportImage(ctx, "root", bytes.NewReader(rootTar(t))); err != nil {
		t.Fatal(err)
	}
	var boxes []node.Sandbox
	for _, name := range []string{"first", "second"} {
		sb, err := a.Create(ctx, node.CreateRequest{Image: "root", Name: name, Network: sandbox.NetworkNone, User: "root",
			Resources: sandbox.Resources{Memory: 256 << 20, Disk: 1 << 30}})
		if err != nil {
			t.Fatal(err)
		}
		sh(t, a, sb, "echo "+name+" > /name")
		boxes = append(boxes, sb)
	}
	// The first brings along what both were cloned from.
	for i, move := range []struct {
		sb   node.Sandbox
		from *native.Client
		to   string
	}{{boxes[0], a, "node1"}, {boxes[1], a, "node1"}, {boxes[0], b, "node0"}} {
		moved, err := move.from.Migrate(ctx, move.sb.Name, move.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("measured: V3 idle microVM of 256 MiB, moved %s %s in %v: downtime %v, %d bytes in all, copies %v, %d in the stream", moved.Way, moved.Why,
			moved.Took.Round(time.Millisecond), moved.Downtime.Round(time.Millisecond), moved.Wire, moved.Rounds, moved.Stream)
		if moved.Way != carry.Live {
			t.Errorf("moved %s: %s", moved.Way, moved.Why)
		}
		if i > 0 && moved.Wire >= idleMove {
			t.Errorf("%d bytes were sent", moved.Wire)
		}
	}
	for i, c := range []*native.Client{a, b} {
		if got := sh(t, c, boxes[i], "cat /name"); got != boxes[i].Name {
			t.Errorf("%s has %q", boxes[i].Name, got)
		}
	}
}
