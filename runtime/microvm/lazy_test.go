package microvm_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/prefetch"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// coldLine is what a file is made of that no restore reads on its own account.
const coldLine = "this is cold and lies there"

// work is what a restored sandbox does first: it starts programs, reads what it had
// in memory and makes something new of it. Each time it is a little different.
func work(i int) string {
	return fmt.Sprintf("sha256sum < /dev/shm/hot; head -c %d /dev/urandom | od -An -tx1 | tail -n 1 > /out%d; ls -l / /usr/bin | sort | tail -n %d; cat /dev/shm/hot | tr a-z A-Z | wc -l", 100000*(i+1), i, i+1)
}

// lived returns a runtime, the spec of a machine that has worked, and its snapshot.
func lived(t *testing.T) (*microvm.Runtime, sandbox.Spec, string, string) {
	t.Helper()
	dir := t.TempDir()
	r, s := open(t, dir), spec(t, "first")
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, "head -c 6000000 /dev/urandom > /dev/shm/hot; yes '"+coldLine+"' | head -c 24000000 > /dev/shm/cold; "+work(0)+"; sync")
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{Stop: true}); err != nil {
		t.Fatal(err)
	}
	return r, s, state, dir
}

// conformance: W5
func TestRestoresTeachWhichPagesTheNextOneNeeds(t *testing.T) {
	r, s, state, dir := lived(t)
	if plan := r.Plan(state); len(plan) != 0 {
		t.Errorf("%d pages are foreseen before the first restore", len(plan))
	}
	restore := func(i int, how string) {
		t.Helper()
		s.ID = fmt.Sprintf("restore%d", i)
		s.Labels = map[string]string{microvm.LabelMemory: how}
		if err := r.Restore(t.Context(), s, state); err != nil {
			t.Fatal(err)
		}
		if r.PagerPID(s.ID) < 0 {
			t.Fatal("all of its memory was read before it ran")
		}
		sh(t, r, s.ID, work(i))
	}
	for i := range 2 {
		restore(i, "")
		if err := r.Destroy(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
	// What was learned is on disk.
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir)
	defer destroyAll(t, r)
	plan := r.Plan(state)

	// One that fetches nothing ahead asks for every page that it touches.
	restore(7, microvm.MemoryLazy)
	touched, err := r.Asked(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	score := prefetch.Compare(plan, touched)
	t.Logf("measured: W5 %d pages touched, %d fetched ahead: %.1f %% of those touched, %.1f %% in vain",
		score.Touched, score.Planned, 100*score.Coverage(), 100*(1-score.Accuracy()))
	if score.Coverage() < 0.85 {
		t.Errorf("only %.1f %% of the pages touched were foreseen", 100*score.Coverage())
	}
	if score.Accuracy() < 0.5 {
		t.Errorf("%.1f %% of the pages fetched were not needed", 100*(1-score.Accuracy()))
	}
	if err := r.Destroy(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}

	// One that follows the plan asks for few.
	restore(9, "")
	missed, err := r.Asked(t.Context(), s.ID)
	if err != nil || float64(len(missed)) > 0.15*float64(score.Touched) {
		t.Errorf("with pages fetched ahead it asked for %d of about %d, %v", len(missed), score.Touched, err)
	}
	// A child knows what its parent knew.
	child := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, child, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if inherited := r.Plan(child); prefetch.Compare(inherited, plan).Coverage() < 0.8 {
		t.Errorf("the child foresees %d pages of its parent's %d", len(inherited), len(plan))
	}
}

// conformance: W5 FR5.3 NFR3.3
func TestAMachineRunsOnPagesThatComeLaterAndOutlivesItsOwner(t *testing.T) {
	r, s, state, dir := lived(t)
	const forks = 3
	for i := range forks {
		s.ID = fmt.Sprintf("fork%d", i)
		if err := r.Restore(t.Context(), s, state); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := r.PagerPID("fork0"), r.PagerPID("fork1"); a < 0 || a != b {
		t.Errorf("forks of one snapshot are served by processes %d and %d", a, b)
	}
	os.RemoveAll(state) // machines need no snapshot any more
	r.Abandon()
	r = open(t, dir)
	want := fmt.Sprintf("%d\n", 24000000/(len(coldLine)+1))
	for i := range forks {
		if got := sh(t, r, fmt.Sprintf("fork%d", i), "grep -c -x '"+coldLine+"' /dev/shm/cold"); got != want {
			t.Errorf("fork %d finds %q whole lines, want %q", i, got, want)
		}
	}
	destroyAll(t, r)
	if left := traces(t, dir); len(left) > 0 {
		open(t, dir).Close() // the next owner clears up
		if left = traces(t, dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// conformance: W5 NFR3.3 FR2.6
func TestAMachineWhoseMemoryIsGoneEndsWithTheReason(t *testing.T) {
	for name, c := range map[string]struct {
		before, after func(t *testing.T, r *microvm.Runtime, state, id string)
		want          string
	}{
		"the process that serves it is killed": {
			after: func(t *testing.T, r *microvm.Runtime, _, id string) {
				if err := unix.Kill(r.PagerPID(id), unix.SIGKILL); err != nil {
					t.Error(err)
				}
			},
			want: "the process that held the machine's memory ended or was killed",
		},
		"a page is damaged": {
			before: func(t *testing.T, _ *microvm.Runtime, state, _ string) { damage(t, state) },
			after: func(t *testing.T, r *microvm.Runtime, _, id string) {
				out, err := run(t.Context(), r, id, "grep -v -x '"+coldLine+"' /dev/shm/cold; echo read all")
				if err == nil {
					t.Errorf("it read what is damaged: %.100q", out)
				}
			},
			want: "the file is damaged",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, s, state, _ := lived(t)
			defer destroyAll(t, r)
			if c.before != nil {
				c.before(t, r, state, s.ID)
			}
			if err := r.Restore(t.Context(), s, state); err != nil {
				t.Fatal(err)
			}
			events := r.Watch(t.Context())
			c.after(t, r, state, s.ID)
			if reason := awaitError(t, r, s.ID); !strings.Contains(reason, c.want) {
				t.Errorf("the reason is %q, want %q in it", reason, c.want)
			}
			for e := range events {
				if e.State == sandbox.Error {
					if !strings.Contains(e.Reason, c.want) {
						t.Errorf("the event says %q", e.Reason)
					}
					break
				}
			}
		})
	}
}

// damage changes one byte of the cold file where it lies in a snapshot's memory.
func damage(t *testing.T, state string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(state, "memory*"))
	if err != nil || len(names) < 2 {
		t.Fatalf("%v, %v", names, err)
	}
	path := names[len(names)-1]
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Its last page and those around it are in use: they are read while it is written.
	page := bytes.Repeat([]byte(coldLine+"\n"), 4096/len(coldLine))[:3800]
	var found []int
	for at := 0; at+len(page) <= len(data); at += 4096 {
		if bytes.Contains(page, data[at+100:at+200]) && bytes.Contains(data[at:at+4096], []byte(coldLine)) {
			found = append(found, at)
		}
	}
	if len(found) < 1000 {
		t.Fatalf("the cold file is not in the snapshot: %d pages of it", len(found))
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("#"), int64(found[len(found)/2]+512)); err != nil {
		t.Fatal(err)
	}
}
