package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// entry is one entry of a layer made for a test.
type entry struct {
	tar.Header
	body string
}

func dir(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func file(name, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body: body}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// testLayer encodes entries as a tar archive.
func testLayer(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack applies layers, lowest first.
func unpack(t testing.TB, layers ...[]byte) (*unpacker, error) {
	t.Helper()
	u, err := newUnpacker(t.TempDir(), Limits{}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	for _, l := range layers {
		if err := u.addTar(context.Background(), bytes.NewReader(l), nil); err != nil {
			return u, err
		}
	}
	return u, nil
}

// describe lists a tree, one line a path, hard links by the first path of their
// inode.
func describe(t testing.TB, tr *tree) string {
	t.Helper()
	var b strings.Builder
	first := map[*inode]string{}
	err := tr.walk(func(name string, n *inode) error {
		fmt.Fprintf(&b, "%s %o %d:%d %d.%09d", name, n.mode, n.uid, n.gid, n.mtime, n.nsec)
		if other, ok := first[n]; ok && !n.isDir() {
			fmt.Fprintf(&b, " = %s", other)
		}
		first[n] = name
		if n.target != "" {
			fmt.Fprintf(&b, " -> %s", n.target)
		}
		if n.data != nil {
			body, err := io.ReadAll(io.NewSectionReader(n.data, 0, n.data.Size()))
			if err != nil {
				return err
			}
			if len(body) > 40 {
				body = fmt.Appendf(nil, "%d bytes %x", len(body), body[:8])
			}
			fmt.Fprintf(&b, " %q", body)
		}
		if len(n.xattrs) > 0 {
			fmt.Fprintf(&b, " %q", n.xattrs)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// sameTree reports the lines in which two descriptions differ.
func sameTree(t testing.TB, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(want, "\n")
	for _, l := range gotLines {
		if !slices.Contains(wantLines, l) {
			t.Errorf("unexpected: %.300s", l)
		}
	}
	for _, l := range wantLines {
		if !slices.Contains(gotLines, l) {
			t.Errorf("missing: %.300s", l)
		}
	}
}

// write makes an EROFS file of a tree.
func write(t testing.TB, tr *tree) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := writeEROFS(f, tr); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// variety is a tree with one of everything that EROFS stores differently.
func variety(t testing.TB) *unpacker {
	t.Helper()
	entries := []entry{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o751, Uid: 3, Gid: 4}},
		file("empty", ""), file("one", "1"), file("block", strings.Repeat("b", blockSize)),
		file("twin", strings.Repeat("b", blockSize)), file("large", strings.Repeat("large", 100_000)),
		symlink("absolute", "/one"), symlink("dangling", "no/where"), symlink("long", strings.Repeat("x/", 2000)+"y"),
		hardlink("other", "one"), hardlink("dir/third", "one"),
		dir("many"), dir("deep/er/and/deeper"), dir("sorted"), file("sorted/!", "before dot"), file("sorted/\xff\xfe", "not UTF-8"),
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: "setuid", Mode: 0o6755, Uid: 70000, Gid: 80000}},
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "tmp", Mode: 0o1777}},
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: "capable", Mode: 0o755, PAXRecords: map[string]string{
			paxXattr + "security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			paxXattr + "user.note":           "hello",
		}}},
	}
	for i := range 700 {
		entries = append(entries, file(fmt.Sprintf("many/%04d-%s", i, strings.Repeat("n", i%200)), fmt.Sprint(i)))
	}
	u, err := unpack(t, testLayer(t, entries...))
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestRootReadsBackAsWritten(t *testing.T) {
	u := variety(t)
	f, err := os.Open(write(t, u.tree))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	back, _ := unpack(t)
	if err := back.addEROFS(f, info.Size()); err != nil {
		t.Fatal(err)
	}
	sameTree(t, describe(t, back.tree), describe(t, u.tree))
	again := write(t, back.tree)
	a, _ := os.ReadFile(f.Name())
	b, _ := os.ReadFile(again)
	if !bytes.Equal(a, b) {
		t.Error("the same tree gave different bytes")
	}
}

func TestFsckAcceptsRoot(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed")
	}
	if out, err := exec.Command(fsck, write(t, variety(t).tree)).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestKernelMountsRootAsWritten compares what the kernel sees with the tree,
// path by path.
func TestKernelMountsRootAsWritten(t *testing.T) {
	u := variety(t)
	compareMounted(t, u.tree, write(t, u.tree))
}

func compareMounted(t *testing.T, tr *tree, root string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	mnt := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", root, mnt).CombinedOutput(); err != nil {
		t.Skipf("this kernel does not mount EROFS: %s", out)
	}
	defer unix.Unmount(mnt, 0)
	paths := 0
	numbers := map[*inode]uint64{}
	err := tr.walk(func(name string, n *inode) error {
		paths++
		full := filepath.Join(mnt, name)
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		got := fmt.Sprintf("%o %d:%d %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		want := fmt.Sprintf("%o %d:%d %d.%09d", n.mode, n.uid, n.gid, n.mtime, n.nsec)
		if got != want {
			t.Errorf("%s: mounted %s, written %s", name, got, want)
		}
		if ino, ok := numbers[n]; ok && ino != st.Ino {
			t.Errorf("%s: a hard link became a copy", name)
		}
		numbers[n] = st.Ino
		compareContents(t, name, full, n)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	seen := 0
	if err := filepath.WalkDir(mnt, func(string, os.DirEntry, error) error { seen++; return nil }); err != nil || seen != paths {
		t.Errorf("mounted %d paths, written %d, %v", seen, paths, err)
	}
}

func compareContents(t *testing.T, name, full string, n *inode) {
	t.Helper()
	switch n.mode & typeMask {
	case typeReg:
		got, err := os.ReadFile(full)
		if err != nil {
			t.Error(err)
		}
		var want []byte
		if n.data != nil {
			want, _ = io.ReadAll(io.NewSectionReader(n.data, 0, n.data.Size()))
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: contents differ", name)
		}
	case typeSymlink:
		if got, err := os.Readlink(full); err != nil || got != n.target {
			t.Errorf("%s: link to %q, %v", name, got, err)
		}
	}
	for attr, want := range n.xattrs {
		buf := make([]byte, 1024)
		size, err := unix.Lgetxattr(full, attr, buf)
		if err != nil {
			t.Errorf("%s: %s: %v", name, attr, err)
		} else if string(buf[:size]) != want {
			t.Errorf("%s: %s is %q", name, attr, buf[:size])
		}
	}
}

func dirHeader(name string, mode int64, id int) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, Uid: id, Gid: id}
}
