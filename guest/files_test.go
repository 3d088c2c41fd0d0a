package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/sandbox"
)

func write(t *testing.T, c *guest.Client, path, data string) {
	t.Helper()
	if err := c.WriteFile(t.Context(), path, strings.NewReader(data)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, c *guest.Client, path string) string {
	t.Helper()
	r, err := c.ReadFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// conformance: SPEC2
func TestFilesAreWrittenAndReadBack(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	for _, data := range []string{"", "text\n", string([]byte{0, 255, 254, '\r', '\n'}), strings.Repeat("big", 1<<20)} {
		path := filepath.Join(dir, "made", "on the way", "f")
		write(t, a.Client, path, data)
		if got := read(t, a.Client, path); got != data {
			t.Errorf("wrote %d bytes, read %d", len(data), len(got))
		}
	}
	if got := read(t, a.Client, "/proc/sys/kernel/ostype"); got != "Linux\n" {
		t.Errorf("a file of /proc, which says that it is empty: got %q", got)
	}
	if got := read(t, a.Client, "/sys/class/net/lo/mtu"); got != "65536\n" {
		t.Errorf("a file of /sys, which says that it is a page: got %q", got)
	}
	_, err := a.ReadFile(t.Context(), dir+"/missing")
	wantKind(t, err, sandbox.NotFound)
	_, err = a.ReadFile(t.Context(), dir)
	wantKind(t, err, sandbox.Invalid)
	_, err = a.ReadFile(t.Context(), "/dev/zero")
	wantKind(t, err, sandbox.Invalid)
	wantKind(t, a.WriteFile(t.Context(), dir, strings.NewReader("x")), sandbox.Invalid)
	wantKind(t, a.WriteFile(t.Context(), dir+"/made/on the way/f/below", strings.NewReader("x")), sandbox.Invalid)
	if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = a.ReadFile(t.Context(), dir+"/fifo")
	wantKind(t, err, sandbox.Invalid)
}

// conformance: SPEC2
func TestDirectoriesAreListedMadeMovedAndRemoved(t *testing.T) {
	a := guesttest.Start(t)
	ctx, dir := t.Context(), t.TempDir()
	if err := a.MakeDir(ctx, dir+"/a/b"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, a.MakeDir(ctx, dir+"/a"), sandbox.Exists)
	write(t, a.Client, dir+"/a/b/f", "12345")
	wantKind(t, a.MakeDir(ctx, dir+"/a/b/f"), sandbox.Invalid)
	if err := os.Chmod(dir+"/a/b/f", 0o640); err != nil {
		t.Fatal(err)
	}
	names := func(depth int) string {
		t.Helper()
		entries, err := a.ReadDir(ctx, dir, depth)
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, e := range entries {
			all = append(all, strings.TrimPrefix(e.Path, dir+"/"))
		}
		return strings.Join(all, " ")
	}
	for depth, want := range map[int]string{0: "a", 1: "a", 2: "a a/b", 3: "a a/b a/b/f", 9: "a a/b a/b/f"} {
		if got := names(depth); got != want {
			t.Errorf("depth %d: got %q, want %q", depth, got, want)
		}
	}
	e, err := a.Stat(ctx, dir+"/a/b/f")
	if err != nil || e.Name != "f" || e.Size != 5 || e.Mode != 0o640 || e.Type != 0 || time.Since(e.Modified) > time.Hour {
		t.Errorf("got %+v %v", e, err)
	}
	if os.Geteuid() == 0 && (e.Owner != "root" || e.Group != "root") {
		t.Errorf("owned by %s:%s", e.Owner, e.Group)
	}
	if err := a.Move(ctx, dir+"/a/b/f", dir+"/new/place"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, a.Move(ctx, dir+"/a/b/f", dir+"/x"), sandbox.NotFound)
	if got := read(t, a.Client, dir+"/new/place"); got != "12345" {
		t.Errorf("moved: got %q", got)
	}
	for range 2 { // a missing entry is no error
		if err := a.Remove(ctx, dir+"/a"); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, a.Remove(ctx, "/"), sandbox.Invalid)
	_, err = a.Stat(ctx, dir+"/a")
	wantKind(t, err, sandbox.NotFound)
	_, err = a.ReadDir(ctx, dir+"/a", 1)
	wantKind(t, err, sandbox.NotFound)
	_, err = a.ReadDir(ctx, dir+"/new/place", 1)
	wantKind(t, err, sandbox.Invalid)
	_, err = a.Stat(ctx, "a\x00b")
	wantKind(t, err, sandbox.Invalid)
}

func TestSymlinksAreDescribedByTheirTargets(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	write(t, a.Client, dir+"/file", "x")
	for link, to := range map[string]string{"good": "file", "todir": ".", "broken": "nowhere", "loop": "loop"} {
		if err := os.Symlink(to, dir+"/"+link); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]guest.Entry{
		"good":   {Type: 0, Target: dir + "/file"},
		"todir":  {Type: fs.ModeDir, Target: dir},
		"broken": {Type: fs.ModeSymlink, Target: "nowhere"},
		"loop":   {Type: fs.ModeSymlink, Target: "loop"},
		"file":   {Type: 0},
	} {
		e, err := a.Stat(t.Context(), dir+"/"+name)
		if err != nil || e.Type != want.Type || e.Target != want.Target || e.Name != name {
			t.Errorf("%s: got %+v %v", name, e, err)
		}
	}
	if entries, err := a.ReadDir(t.Context(), dir+"/todir", 9); err != nil || len(entries) != 5 {
		t.Errorf("got %d entries %v", len(entries), err)
	}
	// A link is removed, not what it leads to.
	if err := a.Remove(t.Context(), dir+"/todir"); err != nil {
		t.Fatal(err)
	}
	if read(t, a.Client, dir+"/file") != "x" {
		t.Error("the target is gone")
	}
}

func TestNamesMayHoldAnyBytes(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	every := make([]byte, 0, 256)
	for b := 1; b < 256; b++ {
		if b != '/' {
			every = append(every, byte(b))
		}
	}
	for _, name := range []string{
		string(every[:200]), string(every[100:]), "latin1-\xe9\xff", "\xf4\x8f\xb8\x80", "nul-is-not", "日本語", "new\nline", "%2F&?=#+ ", `"\`,
	} {
		path := dir + "/" + name
		write(t, a.Client, path, name)
		if got, err := os.ReadFile(path); err != nil || string(got) != name {
			t.Fatalf("%q: the file on disk: %v", name, err)
		}
		if got := read(t, a.Client, path); got != name {
			t.Errorf("%q: read %q", name, got)
		}
		if e, err := a.Stat(t.Context(), path); err != nil || e.Name != name || e.Path != path {
			t.Errorf("%q: got %+v %v", name, e, err)
		}
		entries, err := a.ReadDir(t.Context(), dir, 1)
		if err != nil || len(entries) != 1 || entries[0].Name != name {
			t.Fatalf("%q: got %+v %v", name, entries, err)
		}
		var tarred bytes.Buffer
		r, err := a.Download(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(&tarred, r); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if err := a.Upload(t.Context(), dir+"/copy", &tarred); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if err := a.Move(t.Context(), dir+"/copy/"+name, path); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		for _, gone := range []string{path, dir + "/copy"} {
			if err := a.Remove(t.Context(), gone); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// conformance: SPEC2
func TestALargeDirectoryIsListedWhole(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	const n = 10_000
	for i := range n {
		if err := os.WriteFile(fmt.Sprintf("%s/%05d", dir, i), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	entries, err := a.ReadDir(t.Context(), dir, 1)
	if err != nil || len(entries) != n || entries[0].Name != "00000" || entries[n-1].Name != "09999" {
		t.Fatalf("got %d entries, %v", len(entries), err)
	}
	t.Logf("measured: SPEC2 listing of %d entries in %s", n, time.Since(begin).Round(time.Millisecond))
}

// conformance: FR2.4
func TestAGigabyteStreamsThroughASmallAgent(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 1 GB")
	}
	var disk syscall.Statfs_t
	dir := t.TempDir()
	if err := syscall.Statfs(dir, &disk); err != nil || disk.Bavail*uint64(disk.Bsize) < 3<<30 {
		t.Skip("needs 3 GB of free disk")
	}
	a := guesttest.Start(t)
	const size = 1 << 30
	sum := sha256.New()
	begin := time.Now()
	if err := a.WriteFile(t.Context(), dir+"/big", io.TeeReader(io.LimitReader(&pattern{}, size), sum)); err != nil {
		t.Fatal(err)
	}
	up, grown := time.Since(begin), residentKiB(t, a.PID)
	want := sum.Sum(nil)
	sum.Reset()
	begin = time.Now()
	r, err := a.ReadFile(t.Context(), dir+"/big")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n, err := io.Copy(sum, r); err != nil || n != size || !bytes.Equal(sum.Sum(nil), want) {
		t.Fatalf("got %d bytes, %v", n, err)
	}
	t.Logf("measured: FR2.4 1 GiB with SHA-256 on both sides: up %s, down %s; agent %d KiB", up.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond), residentKiB(t, a.PID))
	if grown > 64<<10 || residentKiB(t, a.PID) > 64<<10 {
		t.Errorf("the agent grew to %d KiB and %d", grown, residentKiB(t, a.PID))
	}
}

// pattern is an endless reader of bytes that do not repeat soon.
type pattern struct{ n uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		p.n = p.n*6364136223846793005 + 1442695040888963407
		b[i] = byte(p.n >> 56)
	}
	return len(b), nil
}

func TestAFullDiskIsSaidSo(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("needs to mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	wantKind(t, a.WriteFile(t.Context(), dir+"/f", io.LimitReader(&pattern{}, 2<<20)), sandbox.Exhausted)
	wantKind(t, a.Upload(t.Context(), dir+"/d", tarOf(t, entry{name: "f", data: strings.Repeat("x", 2<<20)})), sandbox.Exhausted)
}

func TestAnUploadThatFailsLeavesWhatWasThere(t *testing.T) {
	a := guesttest.Start(t)
	ctx, dir := t.Context(), t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("needs to mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	old := tarOf(t, entry{name: "f", data: "old"}, entry{name: "link", kind: tar.TypeSymlink, link: "f"}, entry{name: "hard", kind: tar.TypeLink, link: "f"})
	if err := a.Upload(ctx, dir, old); err != nil {
		t.Fatal(err)
	}
	large := tarOf(t, entry{name: "f", data: strings.Repeat("x", 2<<20)}).Bytes()
	err := a.Upload(ctx, dir, bytes.NewReader(large))
	wantKind(t, err, sandbox.Exhausted)
	if strings.Contains(err.Error(), ".atoll-") || !strings.Contains(err.Error(), `"f"`) {
		t.Errorf("the error does not say what the user knows: %v", err)
	}
	// A client that was killed, as the agent sees it.
	if err := a.Upload(ctx, dir, bytes.NewReader(large[:256<<10])); err == nil {
		t.Error("half an archive was accepted")
	}
	// The same once more replaces everything by itself.
	if err := a.Upload(ctx, dir, tarOf(t, entry{name: "hard", kind: tar.TypeLink, link: "f"}, entry{name: "link", kind: tar.TypeSymlink, link: "f"})); err != nil {
		t.Error(err)
	}
	if got := run(t, a.Client, "cd "+dir+" && cat f hard link && ls -A | xargs"); got != "oldoldoldf hard link\n" {
		t.Errorf("there is now %q", got)
	}
}

func TestWhatTheReaderOfAnUploadSaysEndsIt(t *testing.T) {
	dir := t.TempDir() // outlives the agent, which may still be about to write
	a := guesttest.Start(t)
	broken := errors.New("source broke")
	err := a.WriteFile(t.Context(), dir+"/f", io.MultiReader(strings.NewReader("half"), errReader{broken}))
	if !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// changes collects what a watch reports until it has seen all that is wanted.
func changes(t *testing.T, w *guest.Watcher, want ...guest.Change) {
	t.Helper()
	missing := map[guest.Change]bool{}
	for _, c := range want {
		missing[c] = true
	}
	for len(missing) > 0 {
		c, err := w.Next()
		if err != nil {
			t.Fatalf("%v; still missing %v", err, missing)
		}
		delete(missing, c)
	}
}

// conformance: SPEC2
func TestChangesInADirectoryAreWatched(t *testing.T) {
	a := guesttest.Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	write(t, a.Client, dir+"/old", "x")
	w, err := a.Watch(ctx, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	write(t, a.Client, dir+"/f", "x")
	changes(t, w, guest.Change{Name: "f", Kind: guest.Created}, guest.Change{Name: "f", Kind: guest.Written})
	if err := a.Move(ctx, dir+"/f", dir+"/g"); err != nil {
		t.Fatal(err)
	}
	changes(t, w, guest.Change{Name: "f", Kind: guest.Renamed}, guest.Change{Name: "g", Kind: guest.Created})
	if err := os.Chmod(dir+"/g", 0o600); err != nil {
		t.Fatal(err)
	}
	changes(t, w, guest.Change{Name: "g", Kind: guest.Chmod})
	if err := a.Remove(ctx, dir+"/g"); err != nil {
		t.Fatal(err)
	}
	changes(t, w, guest.Change{Name: "g", Kind: guest.Removed})
	write(t, a.Client, dir+"/bad\xff", "x")
	changes(t, w, guest.Change{Name: "bad\xff", Kind: guest.Created})

	_, err = a.Watch(ctx, dir+"/missing", false)
	wantKind(t, err, sandbox.NotFound)
	_, err = a.Watch(ctx, dir+"/old", false)
	wantKind(t, err, sandbox.Invalid)
}

func TestARecursiveWatchSeesNewDirectories(t *testing.T) {
	a := guesttest.Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	w, err := a.Watch(ctx, dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	write(t, a.Client, dir+"/a/b/f", "x")
	changes(t, w, guest.Change{Name: "a/b/f", Kind: guest.Written})
	write(t, a.Client, dir+"/new/deep/er/f", "x")
	changes(t, w, guest.Change{Name: "new", Kind: guest.Created}, guest.Change{Name: "new/deep/er/f", Kind: guest.Created})
	write(t, a.Client, dir+"/new/deep/er/f", "y")
	changes(t, w, guest.Change{Name: "new/deep/er/f", Kind: guest.Written})
}

// entry is one entry of a tar stream.
type entry struct {
	name, data, link string
	kind             byte
	mode             int64
}

func tarOf(t *testing.T, entries ...entry) *bytes.Buffer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: e.mode, Size: int64(len(e.data)), ModTime: time.Unix(1e9, 0)}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

// conformance: SPEC2 FR2.4
func TestADirectoryGoesInAndOutAsAnArchive(t *testing.T) {
	a := guesttest.Start(t)
	ctx, dir := t.Context(), t.TempDir()
	err := a.Upload(ctx, dir+"/in", tarOf(t,
		entry{name: "./", kind: tar.TypeDir, mode: 0o750},
		entry{name: "sub/", kind: tar.TypeDir, mode: 0o700},
		entry{name: "sub/script", data: "#!/bin/sh\n", mode: 0o755},
		entry{name: "no/parents/given", data: "x"},
		entry{name: "link", kind: tar.TypeSymlink, link: "sub/script"},
		entry{name: "hard", kind: tar.TypeLink, link: "sub/script"},
		entry{name: "empty", data: ""},
	))
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(dir + "/in/sub/script")
	if err != nil || info.Mode() != 0o755 || !info.ModTime().Equal(time.Unix(1e9, 0)) {
		t.Fatalf("got %v %v", info, err)
	}
	for path, mode := range map[string]fs.FileMode{"/in": 0o750, "/in/sub": 0o700} {
		if info, err := os.Stat(dir + path); err != nil || info.Mode().Perm() != mode || !info.ModTime().Equal(time.Unix(1e9, 0)) {
			t.Errorf("%s: got %v %v", path, info, err)
		}
	}
	if to, err := os.Readlink(dir + "/in/link"); err != nil || to != "sub/script" {
		t.Errorf("got %q %v", to, err)
	}
	r, err := a.Download(ctx, dir+"/in")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.Upload(ctx, dir+"/out", r); err != nil {
		t.Fatal(err)
	}
	if diff := run(t, a.Client, "diff -r --no-dereference "+dir+"/in "+dir+"/out && cd "+dir+"/out && stat -c '%a %Y %N' sub/script link"); !strings.HasPrefix(diff, "755 1000000000") {
		t.Errorf("got %q", diff)
	}
	// One file alone.
	one, err := a.Download(ctx, dir+"/in/sub/script")
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if h, err := tar.NewReader(one).Next(); err != nil || h.Name != "script" || h.Size != 10 {
		t.Errorf("got %+v %v", h, err)
	}
	_, err = a.Download(ctx, dir+"/missing")
	wantKind(t, err, sandbox.NotFound)
}

func TestAHostileArchiveStaysInItsDirectory(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	outside := dir + "/outside"
	if err := os.MkdirAll(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(outside+"/secret", []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, entries := range map[string][]entry{
		"dot-dot":            {{name: "../outside/new", data: "x"}},
		"hidden dot-dot":     {{name: "a/../../outside/new", data: "x"}},
		"absolute":           {{name: outside + "/new", data: "x"}},
		"through symlink":    {{name: "s", kind: tar.TypeSymlink, link: outside}, {name: "s/new", data: "x"}},
		"relative symlink":   {{name: "s", kind: tar.TypeSymlink, link: "../outside"}, {name: "s/new", data: "x"}},
		"symlink chain":      {{name: "s", kind: tar.TypeSymlink, link: "t"}, {name: "t", kind: tar.TypeSymlink, link: ".."}, {name: "s/outside/new", data: "x"}},
		"directory over":     {{name: "s", kind: tar.TypeSymlink, link: outside}, {name: "s/", kind: tar.TypeDir, mode: 0o777}, {name: "s/new", data: "x"}},
		"hard link out":      {{name: "h", kind: tar.TypeLink, link: "../outside/secret"}},
		"hard link absolute": {{name: "h", kind: tar.TypeLink, link: outside + "/secret"}},
		"hard link via sym":  {{name: "s", kind: tar.TypeSymlink, link: outside}, {name: "h", kind: tar.TypeLink, link: "s/secret"}},
		"device":             {{name: "d", kind: tar.TypeBlock}},
		"fifo":               {{name: "p", kind: tar.TypeFifo}},
		"the root":           {{name: ".", data: "x"}},
	} {
		into := dir + "/in-" + strings.ReplaceAll(name, " ", "-")
		err := a.Upload(t.Context(), into, tarOf(t, entries...))
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		if names, _ := os.ReadDir(outside); len(names) != 1 {
			t.Fatalf("%s: wrote outside: %v", name, names)
		}
		if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o755 {
			t.Fatalf("%s: changed the mode outside: %v", name, info.Mode())
		}
	}
	// A file that takes the place of a symlink replaces the link itself.
	err := a.Upload(t.Context(), dir+"/ok", tarOf(t, entry{name: "s", kind: tar.TypeSymlink, link: outside + "/secret"}, entry{name: "s", data: "mine"}))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(outside + "/secret"); string(got) != "keep" {
		t.Fatal("written through a symlink")
	}
	wantKind(t, a.Upload(t.Context(), dir+"/bad", strings.NewReader("this is not a tar stream, at all, by any means")), sandbox.Invalid)
}
