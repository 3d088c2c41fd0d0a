package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, damaged, err := Open(dir)
	if err != nil || len(damaged) > 0 {
		t.Fatalf("Open: %v, damaged %v", err, damaged)
	}
	return s
}

// save commits a snapshot that holds one file.
func save(t *testing.T, s *Store, m Manifest, content string) Manifest {
	t.Helper()
	d, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, "memory"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err = d.Commit(m, true)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// conformance: FR5.1
func TestACommittedSnapshotIsThereAfterReopening(t *testing.T) {
	dir := t.TempDir()
	m := save(t, open(t, dir), Manifest{Sandbox: "one", Runtime: "fake", Created: time.Unix(1000, 0).UTC()}, "state")
	s := open(t, dir)
	got, err := s.Get(m.ID)
	if err != nil || got.Sandbox != "one" || got.Size() != 5 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if data, err := os.ReadFile(filepath.Join(s.Dir(m.ID), "memory")); err != nil || string(data) != "state" {
		t.Fatalf("state is %q, %v", data, err)
	}
	if err := s.Verify(m.ID); err != nil {
		t.Fatal(err)
	}
}

func TestAnInterruptedSnapshotLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	d, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, "memory"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The process dies here; another opens the directory.
	s = open(t, dir)
	if entries, _ := os.ReadDir(dir); len(s.List()) != 0 || len(entries) != 0 {
		t.Fatalf("left over: %v", entries)
	}
}

func TestAnInterruptedRemovalIsCompleted(t *testing.T) {
	dir := t.TempDir()
	m := save(t, open(t, dir), Manifest{Created: time.Now()}, "state")
	if err := os.Rename(filepath.Join(dir, m.ID), filepath.Join(dir, gonePrefix+m.ID)); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("left over: %v", entries)
	}
}

func TestDamageIsReportedAndNothingIsDeleted(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"truncated state":  func(p string) error { return os.Truncate(filepath.Join(p, stateName, "memory"), 2) },
		"missing state":    func(p string) error { return os.Remove(filepath.Join(p, stateName, "memory")) },
		"garbage manifest": func(p string) error { return os.WriteFile(filepath.Join(p, manifestName), []byte("{"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			m := save(t, open(t, dir), Manifest{Created: time.Now()}, "state")
			if err := damage(filepath.Join(dir, m.ID)); err != nil {
				t.Fatal(err)
			}
			s, damaged, err := Open(dir)
			if err != nil || len(damaged) != 1 || len(s.List()) != 0 {
				t.Fatalf("damaged %v, list %v, %v", damaged, s.List(), err)
			}
			if _, err := s.Get(m.ID); !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), "snapshot "+m.ID+" is damaged: file m") {
				t.Fatalf("Get says %v", err)
			}
			if _, err := os.Stat(filepath.Join(dir, m.ID)); err != nil {
				t.Fatal("the damaged snapshot was deleted")
			}
			if err := s.Remove(m.ID); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Get(m.ID); !sandbox.Is(err, sandbox.NotFound) {
				t.Fatalf("after its removal Get says %v", err)
			}
		})
	}
}

func TestAFlippedBitIsFound(t *testing.T) {
	s := open(t, t.TempDir())
	m := save(t, s, Manifest{Created: time.Now()}, "state")
	if err := os.WriteFile(filepath.Join(s.Dir(m.ID), "memory"), []byte("sTate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(m.ID); !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), "snapshot "+m.ID+" is damaged: file memory") {
		t.Fatalf("Verify says %v", err)
	}
	if err := s.Verify(m.ID, "mem*"); err != nil {
		t.Errorf("a file that is checked by whoever reads it: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(m.ID), "memory"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(m.ID, "mem*"); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("such a file of another size: %v", err)
	}
}

func TestDamageIsFoundAlsoAfterASnapshotWasFoundSound(t *testing.T) {
	s := open(t, t.TempDir())
	for _, hash := range []bool{true, false} {
		d, err := s.Begin()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d.Dir, "pages.img"), []byte("state"), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := d.Commit(Manifest{Created: time.Now()}, hash)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(s.Dir(m.ID), "pages.img")
		for range 2 {
			if err := s.Verify(m.ID); err != nil {
				t.Fatal(err)
			}
		}
		later := time.Now().Add(time.Second)
		if err := errors.Join(os.WriteFile(file, []byte("sTate"), 0o600), os.Chtimes(file, later, later)); err != nil {
			t.Fatal(err)
		}
		if err := s.Verify(m.ID); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("hashed %v: Verify says %v", hash, err)
		}
	}
}

func TestAFullDiskLeavesNoSnapshot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, dir)
	d, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, "memory"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	// Even the manifest finds no room.
	if _, err := d.Commit(Manifest{Created: time.Now()}, false); !sandbox.Is(err, sandbox.Exhausted) {
		t.Fatalf("Commit says %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 || len(s.List()) != 0 {
		t.Fatalf("left over: %v", entries)
	}
}

// conformance: FR5.4
func TestRetentionKeepsWhatIsPinnedOrNewest(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	snap := func(id, sb string, age time.Duration, size int64) Manifest {
		return Manifest{ID: id, Sandbox: sb, Created: now.Add(-age), Files: []File{{Name: "m", Size: size}}}
	}
	all := []Manifest{
		snap("a1", "a", 5*time.Hour, 10), snap("a2", "a", 4*time.Hour, 10), snap("a3", "a", time.Hour, 10),
		snap("b1", "b", 9*time.Hour, 10), snap("p1", "a", 9*time.Hour, 10),
	}
	pinned := func(m Manifest) bool { return m.ID == "p1" }
	for _, tc := range []struct {
		name   string
		policy chunk.Rules
		want   string
	}{
		{"no limits", chunk.Rules{}, ""},
		{"by age", chunk.Rules{MaxAge: 3 * time.Hour}, "b1 a1 a2"},
		{"by age, the newest of each stays", chunk.Rules{MaxAge: 3 * time.Hour, KeepLast: 1}, "a1 a2"},
		{"by size, oldest first", chunk.Rules{MaxBytes: 30}, "b1 a1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, m := range Expired(all, tc.policy, now, pinned) {
				got = append(got, m.ID)
			}
			if strings.Join(got, " ") != tc.want {
				t.Fatalf("expired %v, want %q", got, tc.want)
			}
		})
	}
}

func TestLineageEndsAtAMissingParentAndAtALoop(t *testing.T) {
	ids := func(ms []Manifest) (out []string) {
		for _, m := range ms {
			out = append(out, m.ID)
		}
		return out
	}
	all := []Manifest{{ID: "c", Parent: "b"}, {ID: "b", Parent: "gone"}, {ID: "x", Parent: "y"}, {ID: "y", Parent: "x"}}
	if got := ids(Lineage(all, "c")); !slices.Equal(got, []string{"c", "b"}) {
		t.Errorf("lineage of c is %v", got)
	}
	if got := ids(Lineage(all, "x")); !slices.Equal(got, []string{"x", "y"}) {
		t.Errorf("lineage of x is %v", got)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"format":1,"id":"abc","files":[{"name":"memory","size":5}]}`))
	f.Add([]byte(`{"format":1,"id":"abc","files":[{"name":"../../etc/passwd","size":5}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Decode(data)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			full := filepath.Join("/store", m.ID, stateName, filepath.FromSlash(file.Name))
			if !strings.HasPrefix(full, "/store/"+m.ID+"/"+stateName) || file.Size < 0 {
				t.Fatalf("accepted a file outside the snapshot: %q", file.Name)
			}
		}
	})
}
