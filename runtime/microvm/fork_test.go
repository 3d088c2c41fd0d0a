package microvm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR5.2 FR5.3 NFR1.1-2
func TestForksGoOnFromOneStateWithNumbersTimeAndNamesOfTheirOwn(t *testing.T) {
	t.Parallel()
	r, s := start(t)
	sh(t, r, s.ID, "echo parent > /mark; head -c 40000000 /dev/zero | tr '\\0' x > /tmp/big; sync")
	dir := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, dir, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, "echo later > /mark")
	// Longer ago than clocks differ.
	time.Sleep(1200 * time.Millisecond)
	const forks = 4
	var wg sync.WaitGroup
	errs := make([]error, forks)
	for i := range forks {
		fork := s
		fork.ID = fmt.Sprintf("fork%d", i)
		wg.Go(func() { errs[i] = r.Restore(t.Context(), fork, dir) })
	}
	wg.Wait()
	drawn := make(map[string]string)
	for i, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("fork%d", i)
		begin := time.Now()
		out := strings.Fields(sh(t, r, id, "od -An -tx8 -N8 /dev/urandom; date +%s; uname -n; cat /mark; sha256sum < /tmp/big"))
		if other := drawn[out[0]]; other != "" {
			t.Errorf("%s and %s draw the same number %s", id, other, out[0])
		}
		drawn[out[0]] = id
		at, err := strconv.ParseInt(out[1], 10, 64)
		// Its clock was read at some moment since, and says whole seconds.
		if now := time.Unix(at, 0); err != nil || now.Before(begin.Add(-2*time.Second)) || now.After(time.Now().Add(time.Second)) {
			t.Errorf("the clock of %s says %v between %v and %v", id, now, begin, time.Now())
		}
		if out[2] != id || out[3] != "parent" {
			t.Errorf("%s is called %s and reads %q", id, out[2], out[3])
		}
		if st, err := r.Stats(t.Context(), id); err != nil || st.Memory <= 0 {
			t.Errorf("%+v, %v", st, err)
		}
	}
	// A fork of a fork, whose memory is a template, a shared delta and a delta of its own.
	sh(t, r, "fork1", "echo child > /mark")
	second := t.TempDir()
	if err := r.Snapshot(t.Context(), "fork1", second, sandbox.SnapshotOptions{Stop: true}); err != nil {
		t.Fatal(err)
	}
	grandchild := s
	grandchild.ID = "grandchild"
	if err := r.Restore(t.Context(), grandchild, second); err != nil {
		t.Fatal(err)
	}
	want := sh(t, r, s.ID, "sha256sum < /tmp/big")
	for id, mark := range map[string]string{"grandchild": "child\n", s.ID: "later\n", "fork0": "parent\n"} {
		if got := sh(t, r, id, "cat /mark"); got != mark {
			t.Errorf("%s reads %q, want %q", id, got, mark)
		}
		if got := sh(t, r, id, "sha256sum < /tmp/big"); got != want {
			t.Errorf("the file of %s has changed", id)
		}
	}
}

// conformance: FR5.4
func TestADamagedTemplateIsMadeAnewAndADamagedSnapshotRefused(t *testing.T) {
	own := t.TempDir()
	if err := shareKernels(own); err != nil {
		t.Fatal(err)
	}
	edit := func(c *microvm.Config) { c.Cache = own }
	r, s := start(t, edit)
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"memory", "devices"} {
		found, err := filepath.Glob(filepath.Join(own, "templates", "*", name))
		if err != nil || len(found) != 1 {
			t.Fatalf("%v, %v", found, err)
		}
		flip(t, found[0])
		fresh, another := open(t, t.TempDir(), edit), spec(t, "another")
		defer destroyAll(t, fresh)
		if err := fresh.Create(t.Context(), another); err != nil {
			t.Fatalf("with damaged %s: %v", name, err)
		}
		if got := sh(t, fresh, another.ID, "echo well"); got != "well\n" {
			t.Errorf("it says %q", got)
		}
		// The snapshot has the same file, which is damaged with it.
		restored := spec(t, "restored")
		restored.Labels = map[string]string{microvm.LabelMemory: microvm.MemoryWhole}
		err = fresh.Restore(t.Context(), restored, state)
		if name == "memory" && !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("a damaged snapshot is restored: %v", err)
		}
	}
}

// flip changes one byte in the middle of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], info.Size()/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], info.Size()/2); err != nil {
		t.Fatal(err)
	}
}

func TestDisksWithManyLayersAreMergedAndNothingIsLost(t *testing.T) {
	t.Parallel()
	r, s := start(t)
	for i := range 14 {
		sh(t, r, s.ID, fmt.Sprintf("echo %d >> /count; head -c 100000 /dev/urandom > /file%d; sync", i, i))
		dir := t.TempDir()
		if err := r.Snapshot(t.Context(), s.ID, dir, sandbox.SnapshotOptions{}); err != nil {
			t.Fatalf("snapshot %d: %v", i, err)
		}
		layers, err := filepath.Glob(filepath.Join(dir, "disk*.qcow2"))
		if err != nil || len(layers) > 12 {
			t.Fatalf("a disk of %d layers, %v", len(layers), err)
		}
		if i < 13 {
			os.RemoveAll(dir)
			continue
		}
		want := sh(t, r, s.ID, "cat /count /file* | sha256sum")
		fork := s
		fork.ID = "fork"
		if err := r.Restore(t.Context(), fork, dir); err != nil {
			t.Fatal(err)
		}
		if got := sh(t, r, "fork", "echo 3 > /proc/sys/vm/drop_caches; cat /count /file* | sha256sum"); got != want {
			t.Error("files changed over the merging of layers")
		}
	}
}
