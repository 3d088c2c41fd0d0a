package native

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

func TestWhatIsPackedUnpacksTheSame(t *testing.T) {
	source, target := t.TempDir(), t.TempDir()
	must[none](t)(none{}, os.MkdirAll(filepath.Join(source, "a", "empty"), 0o755))
	must[none](t)(none{}, os.WriteFile(filepath.Join(source, "a", "run \xff\n"), []byte("x\x00y"), 0o755))
	must[none](t)(none{}, os.Symlink("../nowhere", filepath.Join(source, "a", "link")))
	must[none](t)(none{}, os.Mkdir(filepath.Join(source, "a", "sealed"), 0o555))
	when := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	must[none](t)(none{}, os.Chtimes(filepath.Join(source, "a"), when, when))
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	names := 0
	must[none](t)(none{}, Pack(w, source, "", func(string, int64) { names++ }))
	must[none](t)(none{}, w.Close())
	must[none](t)(none{}, Unpack(&archive, target, ""))
	if names != 5 {
		t.Errorf("%d names", names)
	}
	err := filepath.WalkDir(source, func(file string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(source, file)
		if err != nil || rel == "." {
			return err
		}
		want, _ := os.Lstat(file)
		got, err := os.Lstat(filepath.Join(target, rel))
		if err != nil || got.Mode() != want.Mode() {
			t.Errorf("%q: %v, %v", rel, got, err)
		} else if want.Mode()&fs.ModeSymlink == 0 && !got.ModTime().Equal(want.ModTime()) {
			t.Errorf("%q: %v, not %v", rel, got.ModTime(), want.ModTime())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// hostile archives try to write outside of the target in every way that tar has.
func hostile() map[string][]tar.Header {
	return map[string][]tar.Header{
		"parent":        {{Name: "../x", Typeflag: tar.TypeReg}},
		"deep parent":   {{Name: "./a/../../x", Typeflag: tar.TypeReg}},
		"absolute":      {{Name: "/x", Typeflag: tar.TypeReg}},
		"through link":  {{Name: "./l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "./l/x", Typeflag: tar.TypeReg}},
		"absolute link": {{Name: "./l", Typeflag: tar.TypeSymlink, Linkname: "/tmp"}, {Name: "./l/x", Typeflag: tar.TypeReg}},
		"linked dir":    {{Name: "./l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "./l/", Typeflag: tar.TypeDir, Mode: 0o777}},
	}
}

func archiveOf(headers []tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		_ = w.WriteHeader(&h)
	}
	_ = w.Close()
	return b.Bytes()
}

func TestHostileArchivesStayInTheTarget(t *testing.T) {
	for name, headers := range hostile() {
		t.Run(name, func(t *testing.T) {
			outside := t.TempDir()
			target := filepath.Join(outside, "target")
			_ = Unpack(bytes.NewReader(archiveOf(headers)), target, "") // an error or not, nothing is written outside
			wantOnlyTarget(t, outside)
		})
	}
	if err := Unpack(bytes.NewReader([]byte("no archive at all")), t.TempDir(), ""); err == nil {
		t.Error("garbage is no error")
	}
	if err := Unpack(bytes.NewReader(archiveOf(hostile()["parent"])), t.TempDir(), ""); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a name that leads out: %v", err)
	}
}

func wantOnlyTarget(t *testing.T, outside string) {
	t.Helper()
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) > 1 {
		t.Fatalf("beside the target: %v, %v", entries, err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() == 0o777 {
		t.Fatalf("the directory around the target: %v, %v", info, err)
	}
}

func TestAnInterruptedFileLeavesTheOldOne(t *testing.T) {
	dir := t.TempDir()
	must[none](t)(none{}, os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o644))
	whole := archiveOf([]tar.Header{{Name: "./f", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1 << 20}})
	if err := Unpack(io.MultiReader(bytes.NewReader(whole[:512]), bytes.NewReader(make([]byte, 1000))), dir, ""); err == nil {
		t.Fatal("a cut archive is no error")
	}
	entries, _ := os.ReadDir(dir)
	if got, _ := os.ReadFile(filepath.Join(dir, "f")); string(got) != "old" || len(entries) != 1 {
		t.Errorf("%q, %v", got, entries)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, headers := range hostile() {
		f.Add(archiveOf(headers), "name")
	}
	f.Fuzz(func(t *testing.T, archive []byte, name string) {
		if name == "." || name == ".." || filepath.Base(name) != name {
			name = "" // names are ours and have no slashes
		}
		outside := t.TempDir()
		_ = Unpack(bytes.NewReader(archive), filepath.Join(outside, "target"), name)
		wantOnlyTarget(t, outside)
	})
}
