package microvm_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// journey is a snapshot of which only what is asked for comes, until the rest is let through.
type journey struct {
	t       *testing.T
	dir     string
	wants   *arrive.Wants
	from    map[string]*os.File
	to      map[string]*os.File
	total   int64
	brought atomic.Int64 // bytes

	mu     sync.Mutex
	have   map[arrive.Want]bool // pieces that were brought
	needed map[arrive.Want]bool // for which a machine had to wait: a round trip each, over a link
	ahead  map[arrive.Want]bool // that were asked for before any machine waited for them
}

// set out makes a directory to which the snapshot in state comes.
func setOut(t *testing.T, state string) *journey {
	t.Helper()
	j := &journey{t: t, dir: t.TempDir(), from: make(map[string]*os.File), to: make(map[string]*os.File), have: make(map[arrive.Want]bool),
		needed: make(map[arrive.Want]bool), ahead: make(map[arrive.Want]bool)}
	entries, err := os.ReadDir(state)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		from, to := filepath.Join(state, e.Name()), filepath.Join(j.dir, e.Name())
		if !strings.HasPrefix(e.Name(), "memory") || info.Size() < 32<<20 {
			if err := supervisor.CopyFile(to, from); err != nil {
				t.Fatal(err)
			}
			continue
		}
		var errs [2]error
		j.from[e.Name()], errs[0] = os.Open(from)
		j.to[e.Name()], errs[1] = arrive.Create(to, info.Size())
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = j.from[e.Name()].Close(), j.to[e.Name()].Close() })
		j.total += info.Size()
	}
	if j.total == 0 {
		t.Fatalf("nothing of %v is large", entries)
	}
	if j.wants, err = arrive.Make(j.dir); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			w, err := j.wants.Next()
			if err != nil {
				return
			}
			j.note(w)
			j.bring(w)
		}
	}()
	return j
}

// note remembers why a piece was asked for first.
func (j *journey) note(w arrive.Want) {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := arrive.Want{File: w.File, Offset: w.Offset - w.Offset%arrive.PieceSize}
	if !j.ahead[p] && !j.needed[p] {
		map[bool]map[arrive.Want]bool{true: j.ahead, false: j.needed}[w.Ahead][p] = true
	}
}

// asked returns the pieces for which machines waited, and those that were asked for ahead of that.
func (j *journey) asked() (needed, ahead map[arrive.Want]bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return maps.Clone(j.needed), maps.Clone(j.ahead)
}

// bring copies one piece, once.
func (j *journey) bring(w arrive.Want) {
	j.mu.Lock()
	defer j.mu.Unlock()
	w = arrive.Want{File: w.File, Offset: w.Offset - w.Offset%arrive.PieceSize}
	if j.from[w.File] == nil || j.have[w] {
		return
	}
	j.have[w] = true
	buf := make([]byte, arrive.PieceSize)
	n, err := j.from[w.File].ReadAt(buf, w.Offset)
	if err != nil && !errors.Is(err, io.EOF) {
		j.t.Error(err)
	}
	if _, err := j.to[w.File].WriteAt(buf[:n], w.Offset); err != nil {
		j.t.Error(err)
	}
	j.brought.Add(int64(n))
}

// finish brings the rest.
func (j *journey) finish() {
	j.t.Helper()
	for name, f := range j.from {
		info, err := f.Stat()
		if err != nil {
			j.t.Fatal(err)
		}
		for at := int64(0); at < info.Size(); at += arrive.PieceSize {
			j.bring(arrive.Want{File: name, Offset: at})
		}
		if err := arrive.Finish(j.to[name]); err != nil {
			j.t.Fatal(err)
		}
	}
	if err := j.wants.Remove(); err != nil {
		j.t.Fatal(err)
	}
}

// conformance: W5
func TestAMachineRunsBeforeItsMemoryHasCome(t *testing.T) {
	r, s, state, _ := lived(t)
	s.ID = "teacher" // what it needs is known afterwards
	if err := r.Restore(t.Context(), s, state); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, work(1))
	if err := errors.Join(r.Destroy(t.Context(), s.ID), r.Close()); err != nil {
		t.Fatal(err)
	}

	j := setOut(t, state)
	r = open(t, t.TempDir()) // another node
	defer destroyAll(t, r)
	s.ID = "early"
	if err := r.Restore(t.Context(), s, j.dir); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, work(2))
	first := j.brought.Load()
	t.Logf("measured: W5 from another node: %d of %d bytes of memory had come when the first work was done", first, j.total)
	if first > j.total*3/4 {
		t.Errorf("%d bytes of %d had to come", first, j.total)
	}
	err := r.Snapshot(t.Context(), s.ID, t.TempDir(), sandbox.SnapshotOptions{})
	if !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("it is saved before it is here: %v", err)
	}
	j.finish()
	want := fmt.Sprintf("%d\n", 24000000/(len(coldLine)+1))
	if got := sh(t, r, s.ID, "grep -c -x '"+coldLine+"' /dev/shm/cold"); got != want {
		t.Errorf("it finds %q whole lines, want %q", got, want)
	}
	child := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, child, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	s.ID = "child"
	if err := r.Restore(t.Context(), s, child); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, r, s.ID, "grep -c -x '"+coldLine+"' /dev/shm/cold"); got != want {
		t.Errorf("its child finds %q whole lines, want %q", got, want)
	}
}

// conformance: W5
func TestAMachineWhoseMemoryNeverComesEndsWithTheReason(t *testing.T) {
	r, s, state, _ := lived(t)
	defer destroyAll(t, r)
	s.Labels = map[string]string{microvm.LabelMemory: microvm.MemoryLazy}
	j := setOut(t, state)
	s.ID = "lost"
	if err := r.Restore(t.Context(), s, j.dir); err != nil {
		t.Fatal(err)
	}
	for _, f := range j.to {
		if err := arrive.GiveUp(f); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := run(t.Context(), r, s.ID, "cat /dev/shm/cold | wc -l; echo read all"); err == nil {
		t.Errorf("it read what never came: %.100q", out)
	}
	if reason, want := awaitError(t, r, s.ID), "did not come from the node that has it"; !strings.Contains(reason, want) {
		t.Errorf("the reason is %q, want %q in it", reason, want)
	}
}

// conformance: W5
func TestWhatRestoresNeedIsForeseenOverALink(t *testing.T) {
	r, s, state, _ := lived(t)
	for i := range 2 {
		s.ID = fmt.Sprintf("teacher%d", i)
		if err := r.Restore(t.Context(), s, state); err != nil {
			t.Fatal(err)
		}
		sh(t, r, s.ID, work(i+1))
		if err := r.Destroy(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// arrived restores it on a node that has nothing of it, has it work, and returns which pieces were asked for.
	arrived := func(how string) (needed, ahead map[arrive.Want]bool, brought, total int64) {
		t.Helper()
		j := setOut(t, state)
		r := open(t, t.TempDir())
		defer destroyAll(t, r)
		s.ID, s.Labels = "heldout", map[string]string{microvm.LabelMemory: how}
		if err := r.Restore(t.Context(), s, j.dir); err != nil {
			t.Fatal(err)
		}
		sh(t, r, s.ID, work(7))
		needed, ahead = j.asked()
		brought = j.brought.Load()
		j.finish()
		return needed, ahead, brought, j.total
	}
	touched, none, _, _ := arrived(microvm.MemoryLazy) // nothing is foreseen: it waits for each piece that it touches
	if len(none) > 0 {
		t.Errorf("%d pieces were asked for ahead of need", len(none))
	}
	missed, planned, brought, total := arrived("")
	hits := 0
	for p := range planned {
		if touched[p] {
			hits++
		}
	}
	waste := len(planned) - hits
	coverage, accuracy := float64(hits)/float64(len(touched)), float64(hits)/float64(max(1, len(planned)))
	t.Logf("measured: W5 over a link, by pieces of %d bytes: %d touched, %d asked for ahead: coverage %.1f %%, accuracy %.1f %%, %d bytes of waste; a machine waits %d times instead of %d; %d of %d bytes had come",
		arrive.PieceSize, len(touched), len(planned), 100*coverage, 100*accuracy, waste*arrive.PieceSize, len(missed), len(touched), brought, total)
	if coverage < 0.85 || accuracy < 0.85 {
		t.Errorf("coverage %.3f, accuracy %.3f", coverage, accuracy)
	}
	if len(missed)*5 > len(touched) {
		t.Errorf("it waits for %d pieces, and for %d when nothing is foreseen", len(missed), len(touched))
	}
}
