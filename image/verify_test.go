package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// flip changes one byte in the middle of a file, as a bad disk would.
func flip(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Second) // the clock of file systems is coarse
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
}

// conformance: FR2.2
func TestADamagedRootIsNotUsedAndMadeAnew(t *testing.T) {
	for name, damage := range map[string]func(path string){
		"flipped":   func(path string) { flip(t, path) },
		"truncated": func(path string) { _ = os.Truncate(path, 4096) },
		"missing":   func(path string) { _ = os.Remove(path) },
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			i := importText(t, s, "a", strings.Repeat("some text", 2000))
			if err := s.VerifyRoot(i.Root); err != nil {
				t.Fatal(err)
			}
			damage(i.Root.Path)
			for range 2 {
				err := s.VerifyRoot(i.Root)
				if !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), "damaged") {
					t.Fatalf("VerifyRoot says %v", err)
				}
			}
			if importText(t, s, "a", strings.Repeat("some text", 2000)).Root != i.Root {
				t.Fatal("the same content has another root")
			}
			if err := s.VerifyRoot(i.Root); err != nil {
				t.Fatal(err)
			}
			checkWhole(t, s)
		})
	}
}

func TestARootIsReadOnceAfterABoot(t *testing.T) {
	s := openStore(t)
	i := importText(t, s, "a", "text")
	note := filepath.Join(s.dir, "sound", rootName(i.Root.Digest))
	for _, text := range []string{"", "of another boot"} {
		if err := os.WriteFile(note, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if s.looksSound(rootName(i.Root.Digest)) {
			t.Fatalf("the note %q is believed", text)
		}
		if err := s.VerifyRoot(i.Root); err != nil {
			t.Fatal(err)
		}
		if !s.looksSound(rootName(i.Root.Digest)) {
			t.Fatal("what was read is not noted")
		}
	}
}

func TestAnArchiveTakesNoNameFromAnotherImage(t *testing.T) {
	source := openStore(t)
	for _, name := range []string{"base", "mine"} {
		importText(t, source, name, "new")
		var archive strings.Builder
		if err := source.Export(t.Context(), name, &archive); err != nil {
			t.Fatal(err)
		}
		s := openStore(t)
		old := importText(t, s, name, "old")
		if _, err := s.Import(t.Context(), strings.NewReader(archive.String()), ImportOptions{}); !sandbox.Is(err, sandbox.Exists) {
			t.Errorf("an archive of %s: %v", name, err)
		}
		if got, err := s.Get(name); err != nil || got.ID != old.ID {
			t.Errorf("%s is now %+v, %v", name, got, err)
		}
		// Said explicitly, it can be done, and done again.
		made, err := s.Import(t.Context(), strings.NewReader(archive.String()), ImportOptions{Name: "other"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Tag("other", name); err != nil {
			t.Fatal(err)
		}
		if again, err := s.Import(t.Context(), strings.NewReader(archive.String()), ImportOptions{}); err != nil || again.ID != made.ID {
			t.Errorf("the same archive again: %+v, %v", again, err)
		}
	}
}

func TestBaseIsNotReplacedByNamingAnImageSo(t *testing.T) {
	s := openStore(t)
	old := importText(t, s, BaseName, "old")
	_, err := s.Import(t.Context(), strings.NewReader(string(testLayer(t, file("text", "new")))), ImportOptions{Name: "base:latest"})
	if !sandbox.Is(err, sandbox.Exists) {
		t.Errorf("Import: %v", err)
	}
	if got, err := s.Get(BaseName); err != nil || got.ID != old.ID {
		t.Errorf("base is now %+v, %v", got, err)
	}
	importText(t, s, "mine", "one")
	if i := importText(t, s, "mine", "two"); i.Root == old.Root {
		t.Error("a name that was given by hand does not move")
	}
}
