package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// oddTree makes a tree with everything that a tree can have.
func oddTree(t *testing.T) string {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	must(os.MkdirAll(at("a/b"), 0o755))
	must(os.WriteFile(at("a/b/file"), []byte("content"), 0o644))
	must(os.Link(at("a/b/file"), at("a/hard")))
	must(os.Symlink("../../../etc/passwd", at("a/escape")))
	must(os.Symlink("/", at("slash")))
	must(unix.Mkfifo(at("pipe"), 0o640))
	must(os.WriteFile(at("new\nline \xff\xfe %s"), []byte("odd"), 0o600))
	must(os.WriteFile(at("setuid"), nil, 0o755))
	must(os.Chmod(at("setuid"), 0o755|fs.ModeSetuid))
	must(os.Mkdir(at("readonly"), 0o755))
	must(os.WriteFile(at("readonly/in"), []byte("x"), 0o444))
	must(os.Chmod(at("readonly"), 0o555|fs.ModeSticky))
	must(os.WriteFile(at("sparse"), []byte("start"), 0o600))
	must(os.Truncate(at("sparse"), 50<<20))
	must(unix.Setxattr(at("a/b/file"), "user.colour", []byte("green"), 0))
	l, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	must(err)
	defer syscall.Close(l)
	must(os.WriteFile(at("long"+strings.Repeat("x", 240)), []byte("long"), 0o600))
	old := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	must(os.Chtimes(at("a/b/file"), old, old))
	must(os.Chtimes(at("a"), old, old))
	return dir
}

// describe lists a tree, one line a file.
func describe(t *testing.T, dir string) []string {
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		var content string
		switch {
		case d.Type().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(bytes.TrimRight(b, "\x00"))
		case d.Type() == fs.ModeSymlink:
			if content, err = os.Readlink(path); err != nil {
				return err
			}
		}
		size := info.Size()
		if d.IsDir() {
			size = 0
		}
		mtime := info.ModTime().UnixNano()
		if d.Type() == fs.ModeSymlink {
			mtime = 0 // not kept
		}
		value := make([]byte, 100)
		n, _ := unix.Lgetxattr(path, "user.colour", value)
		lines = append(lines, fmt.Sprintf("%q %v %d %d:%d %d links=%d %q %q",
			strings.TrimPrefix(path, dir), info.Mode(), size, st.Uid, st.Gid, mtime, st.Nlink, content, value[:max(n, 0)]))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestATreeComesBackAsItWas(t *testing.T) {
	for _, o := range []Options{{}, {Prefix: "home/user"}} {
		dir := oddTree(t)
		want := describe(t, dir)
		var archive bytes.Buffer
		if err := Write(t.Context(), &archive, dir, o); err != nil {
			t.Fatal(err)
		}
		if o.Prefix != "" && !bytes.Contains(archive.Bytes(), []byte("home/user/a/b/file")) {
			t.Error("the prefix is missing")
		}
		back := t.TempDir()
		if err := Extract(t.Context(), &archive, back, o); err != nil {
			t.Fatal(err)
		}
		if got := describe(t, back); !slices.Equal(got, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(back, "sparse"), &st); err != nil || st.Blocks*512 > 1<<20 {
			t.Errorf("the sparse file takes %d bytes on disk (%v)", st.Blocks*512, err)
		}
	}
}

func TestRemovalsInAnOverlayAreWhiteouts(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mknod(filepath.Join(dir, "gone"), unix.S_IFCHR, 0); err != nil {
		t.Skipf("may not make whiteouts here: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "fresh"), 0o755); err != nil {
		t.Fatal(err)
	}
	o := Options{Overlay: true, UserXattr: true, Prefix: "work"}
	if err := unix.Setxattr(filepath.Join(dir, "fresh"), o.opaqueXattr(), []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := Write(t.Context(), &archive, dir, o); err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(bytes.NewReader(archive.Bytes())); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if want := []string{"work/fresh/", "work/fresh/.wh..wh..opq", "work/.wh.gone"}; !slices.Equal(names, want) {
		t.Errorf("entries %q, want %q", names, want)
	}
	back := t.TempDir()
	if err := Extract(t.Context(), &archive, back, o); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(filepath.Join(back, "gone"))
	if err != nil || info.Mode()&fs.ModeCharDevice == 0 || info.Sys().(*syscall.Stat_t).Rdev != 0 {
		t.Errorf("the whiteout came back as %v, %v", info, err)
	}
	value := make([]byte, 4)
	if n, err := unix.Getxattr(filepath.Join(back, "fresh"), o.opaqueXattr(), value); err != nil || string(value[:n]) != "y" {
		t.Errorf("the opaque directory came back with %q, %v", value[:n], err)
	}
}

func TestSkipAndBound(t *testing.T) {
	dir := oddTree(t)
	var archive bytes.Buffer
	if err := Write(t.Context(), &archive, dir, Options{Skip: func(rel string) bool { return rel != "long" && rel != "a/b" && rel != "a" }}); err != nil {
		t.Fatal(err)
	}
	back := t.TempDir()
	if err := Extract(t.Context(), &archive, back, Options{}); err != nil {
		t.Fatal(err)
	}
	if got := describe(t, back); len(got) != 2 {
		t.Errorf("got %q, want a and a/b only", got)
	}
	if err := Write(t.Context(), io.Discard, dir, Options{MaxBytes: 1 << 20}); !errors.Is(err, ErrTooBig) {
		t.Errorf("Write of 50 MiB into 1 MiB: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Write(ctx, io.Discard, dir, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Write for a caller who has gone: %v", err)
	}
}

// hostile archives, each of which must be refused.
func hostile(t testing.TB) map[string][]byte {
	make1 := func(headers ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			h.Format = tar.FormatPAX
			h.Mode = 0o777
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, h.Size)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	file := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1} }
	return map[string][]byte{
		"dotdot":           make1(file("../evil")),
		"inner dotdot":     make1(tar.Header{Name: "a", Typeflag: tar.TypeDir}, file("a/../../evil")),
		"absolute":         make1(file("/evil")),
		"through link":     make1(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, file("l/evil")),
		"through abs link": make1(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/"}, file("l/evil")),
		"hard link out":    make1(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../evil"}),
		"link to missing":  make1(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "x"}),
		"twice":            make1(file("a"), file("a")),
		"device":           make1(tar.Header{Name: "d", Typeflag: tar.TypeBlock, Devmajor: 8}),
		"no archive":       []byte(strings.Repeat("garbage ", 1000)),
		"cut":              make1(file("a"))[:512],
	}
}

func TestHostileArchivesAreRefused(t *testing.T) {
	for name, archive := range hostile(t) {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			dir := filepath.Join(outer, "in", "deep")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			err := Extract(t.Context(), bytes.NewReader(archive), dir, Options{Overlay: true})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if name != "through link" && name != "through abs link" && !errors.Is(err, ErrMalformed) {
				t.Errorf("refused with %v, want ErrMalformed", err)
			}
			if _, err := os.Lstat(filepath.Join(outer, "in", "evil")); err == nil {
				t.Error("it wrote outside")
			}
		})
	}
}

func FuzzExtract(f *testing.F) {
	for _, archive := range hostile(f) {
		f.Add(archive)
	}
	f.Fuzz(func(t *testing.T, archive []byte) {
		outer := t.TempDir()
		dir := filepath.Join(outer, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = Extract(t.Context(), bytes.NewReader(archive), dir, Options{Overlay: true, MaxBytes: 1 << 20})
		entries, err := os.ReadDir(outer)
		if err != nil || len(entries) != 1 {
			t.Fatalf("outside the directory there is %v, %v", entries, err)
		}
		// What was laid out may hold directories without permissions.
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if d != nil && d.IsDir() {
				_ = os.Chmod(path, 0o755)
			}
			return nil
		})
	})
}
