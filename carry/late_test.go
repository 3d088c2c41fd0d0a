package carry_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// lateLine is two nodes with a line between them, of which the first has a snapshot that may come late to the second.
func lateLine(t *testing.T) (a, b *host, wire *cutter, m snapshot.Manifest, memory []byte) {
	t.Helper()
	a = newHostWith(t, "a", options{late: true, rate: slow})
	b = newHostWith(t, "b", options{late: true, rate: slow, patience: 2 * time.Second})
	wire = newCutter(t, a.Addr)
	peertest.Join(t, b.Node, a.Node, wire.Addr().String())
	memory = content(3, 40*mib)
	root := a.addImage(t, "base", content(1, mib)).Root
	m = a.save(t, root, "", map[string][]byte{"pages.img": memory, "devices": content(4, 100_000)})
	if err := os.WriteFile(filepath.Join(a.snapshots.Dir(m.ID), "learned"), []byte("hints"), 0o600); err != nil {
		t.Fatal(err)
	}
	return a, b, wire, m, memory
}

// until waits for something that happens.
func until(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for range 6000 {
		if happened() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("it does not happen: %s", what)
}

// pieceIs reports whether a piece of a file is there, and how much of the file is.
func pieceIs(t *testing.T, path string, want []byte, at int) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, arrive.PieceSize)
	if _, err := f.ReadAt(got, int64(at)); err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(got, want[at:at+arrive.PieceSize])
}

// conformance: W5
func TestASnapshotIsLentWhileItComesAndWhatIsAskedForComesFirst(t *testing.T) {
	a, b, _, m, memory := lateLine(t)
	res, err := b.PullLate(ctx, m.ID, "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.Wire > 10*mib {
		t.Errorf("%d bytes came before it could be restored", res.Wire)
	}
	dir := b.snapshots.Dir(m.ID)
	pipe, err := arrive.Open(dir)
	if err != nil || pipe == nil {
		t.Fatalf("it is not on its way: %v, %v", pipe, err)
	}
	defer pipe.Close()
	if _, err := b.snapshots.Get(m.ID); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("half of it counts as here: %v", err)
	}
	if got, err := b.nodes.GetSnapshot(ctx, m.ID); err != nil || got.ID != m.ID {
		t.Errorf("it cannot be restored: %v", err)
	}
	if err := b.nodes.RemoveSnapshot(ctx, m.ID); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("it is removed while it comes: %v", err)
	}
	if err := b.snapshots.Verify(m.ID, "pages*"); err != nil {
		t.Error(err)
	}
	if hints, err := os.ReadFile(filepath.Join(dir, "learned")); err != nil || string(hints) != "hints" {
		t.Errorf("what was learned is %q, %v", hints, err)
	}
	if again, err := b.PullLate(ctx, m.ID, "a", nil); err != nil || again.Wire != 0 {
		t.Errorf("it is pulled again: %+v, %v", again, err)
	}
	path := filepath.Join(dir, "pages.img")
	asked, behind := 30*mib, 31*mib
	arrive.Ask(pipe, arrive.Want{File: "pages.img", Offset: int64(asked) + 5})
	arrive.Ask(pipe, arrive.Want{File: "pages.img", Offset: -1}) // nonsense is nothing
	arrive.Ask(pipe, arrive.Want{File: "other", Offset: 1 << 60})
	until(t, "the piece comes", func() bool { return pieceIs(t, path, memory, asked) })
	if pieceIs(t, path, memory, behind) {
		t.Error("it came no sooner than others")
	}
	until(t, "all comes", func() bool { _, err := b.snapshots.Get(m.ID); return err == nil })
	same(t, a, b, m.ID)
	if n, pieces := len(a.asked()), 40*mib/arrive.PieceSize; n > pieces/4 {
		t.Errorf("%d requests for %d pieces", n, pieces)
	}
	if late, err := arrive.Late(path); late || err != nil {
		t.Errorf("it is still late: %v", err)
	}
	if pipe, err := arrive.Open(dir); pipe != nil || err != nil {
		t.Errorf("the pipe is left: %v", err)
	}
	whole(t, b.dir, m.ID) // as the next process finds it
}

// conformance: W5
func TestWhatNeverComesIsTakenAway(t *testing.T) {
	_, b, wire, m, memory := lateLine(t)
	if _, err := b.PullLate(ctx, m.ID, "a", nil); err != nil {
		t.Fatal(err)
	}
	// Whoever runs on it has names of its own for its files.
	mine := filepath.Join(t.TempDir(), "memory")
	if err := os.Link(filepath.Join(b.snapshots.Dir(m.ID), "pages.img"), mine); err != nil {
		t.Fatal(err)
	}
	wire.dead.Store(true)
	wire.drop()
	until(t, "it is given up", func() bool { return len(b.snapshots.Lent()) == 0 })
	until(t, "its files are cut", func() bool {
		info, err := os.Stat(mine)
		return err == nil && info.Size() == 0
	})
	until(t, "nothing is left", func() bool {
		left, err := os.ReadDir(filepath.Join(b.dir, "snapshots"))
		return err == nil && len(left) == 0
	})
	wire.dead.Store(false)
	until(t, "the node answers again", func() bool {
		_, err := b.Pull(ctx, carry.Snapshot, m.ID, "a", nil)
		return err == nil
	})
	if got, err := os.ReadFile(filepath.Join(b.snapshots.Dir(m.ID), "pages.img")); err != nil || !bytes.Equal(got, memory) {
		t.Errorf("it does not come after that: %v", err)
	}
}

// A process that ends while a snapshot comes leaves nothing of it to the next one.
func TestHalfASnapshotDoesNotOutliveItsProcess(t *testing.T) {
	dir := t.TempDir()
	s, _, err := snapshot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.Receive("abc")
	if err == nil {
		err = errors.Join(os.WriteFile(filepath.Join(d.Dir, "pages.img"), nil, 0o600), d.Lend(snapshot.Manifest{ID: "abc", Files: []snapshot.File{{Name: "pages.img"}}}))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Usable("abc"); err != nil {
		t.Error(err)
	}
	again, damaged, err := snapshot.Open(dir)
	if err != nil || len(damaged) > 0 || len(again.List()) > 0 {
		t.Errorf("%v, %v, %v", again.List(), damaged, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
