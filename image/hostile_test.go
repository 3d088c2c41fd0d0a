package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// Overlay semantics, one case each. Times are all zero in these archives.
func TestLayersMergeAsOverlaysDo(t *testing.T) {
	lower := testLayer(t, dir("d"), file("d/a", "1"), file("d/b", "1"), dir("d/s"), file("d/s/x", "1"), symlink("l", "d"), file("f", "1"), hardlink("d/h", "f"))
	for name, c := range map[string]struct {
		upper []entry
		want  string // what changes says; f is a hard link of d/h
	}{
		"upper file wins":                    {[]entry{file("d/a", "2")}, `/d/a="2"`},
		"whiteout removes":                   {[]entry{file("d/.wh.a", "")}, `-/d/a`},
		"whiteout of directory":              {[]entry{file("d/.wh.s", "")}, `-/d/s -/d/s/x`},
		"whiteout of nothing":                {[]entry{file("d/.wh.none", ""), file("none/.wh.x", ""), file("f/.wh.x", "")}, ``},
		"opaque hides lower, before":         {[]entry{file("d/.wh..wh..opq", ""), file("d/n", "2")}, `-/d/a -/d/b -/d/h -/d/s -/d/s/x /d/n="2" /f="1"`},
		"opaque hides lower, after":          {[]entry{file("d/n", "2"), file("d/.wh..wh..opq", "")}, `-/d/a -/d/b -/d/h -/d/s -/d/s/x /d/n="2" /f="1"`},
		"whiteout spares its own layer":      {[]entry{file("d/a", "2"), file("d/.wh.a", "")}, `/d/a="2"`},
		"whiteout prunes below own dir":      {[]entry{file("d/s/y", "2"), file("d/.wh.s", "")}, `-/d/s/x /d/s/y="2"`},
		"other aufs bookkeeping is ignored":  {[]entry{file("d/.wh..wh.plnk", "")}, ``},
		"file replaces directory":            {[]entry{file("d/s", "2")}, `/d/s="2" -/d/s/x`},
		"directory replaces link":            {[]entry{dir("l"), file("l/y", "2")}, `/l=dir /l/y="2"`},
		"path goes through a link":           {[]entry{file("l/y", "2")}, `/d/y="2"`},
		"whiteout goes through a link":       {[]entry{file("l/.wh.a", "")}, `-/d/a`},
		"opaque own dir over a link":         {[]entry{dir("l"), file("l/.wh..wh..opq", "")}, `/l=dir`},
		"hard link to lower layer":           {[]entry{hardlink("new", "d/a")}, `/new=link:/d/a`},
		"changing one name of a hard link":   {[]entry{file("f", "2")}, `/f="2"`},
		"whiteout of one name of an inode":   {[]entry{hardlink("g", "f"), file(".wh.f", "")}, `-/f /g=link:/d/h`},
		"missing parents are made":           {[]entry{file("p/q/r", "2")}, `/p=dir /p/q=dir /p/q/r="2"`},
		"absolute names are the image's own": {[]entry{file("/etc/x", "2")}, `/etc=dir /etc/x="2"`},
		"the last of equal names wins":       {[]entry{file("z", "2"), file("z", "3")}, `/z="3"`},
		"link target climbs, and stays in":   {[]entry{symlink("up", "../../../d"), file("up/y", "2")}, `/up->../../../d /d/y="2"`},
		"devices below /dev are left out":    {[]entry{dir("dev"), {Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Devmajor: 1, Devminor: 3}}}, `/dev=dir`},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := unpack(t, lower)
			if err != nil {
				t.Fatal(err)
			}
			after, err := unpack(t, lower, testLayer(t, c.upper...))
			if err != nil {
				t.Fatal(err)
			}
			got := changes(t, before.tree, after.tree)
			want := strings.Fields(c.want)
			if fmt.Sprint(sorted(got)) != fmt.Sprint(sorted(want)) {
				t.Errorf("changes %q, want %q", got, want)
			}
		})
	}
}

func sorted(words []string) map[string]bool {
	out := map[string]bool{}
	for _, w := range words {
		out[w] = true
	}
	return out
}

// changes says what b has that a has not, and what it lost.
func changes(t *testing.T, a, b *tree) []string {
	t.Helper()
	describe := func(tr *tree) map[string]string {
		out, first := map[string]string{}, map[*inode]string{}
		_ = tr.walk(func(name string, n *inode) error {
			switch {
			case n.isDir():
				out[name] = "=dir"
			case n.target != "":
				out[name] = "->" + n.target
			case first[n] != "":
				out[name] = "=link:" + first[n]
			default:
				first[n] = name
				body, err := io.ReadAll(io.NewSectionReader(n.data, 0, n.size()))
				if err != nil {
					t.Fatal(err)
				}
				out[name] = fmt.Sprintf("=%q", body)
			}
			return nil
		})
		return out
	}
	before, after := describe(a), describe(b)
	var out []string
	for name, what := range after {
		if before[name] != what {
			out = append(out, name+what)
		}
	}
	for name := range before {
		if _, ok := after[name]; !ok {
			out = append(out, "-"+name)
		}
	}
	return out
}

// conformance: FR2.2
func TestHostileArchivesAreRefusedAndLeaveNothing(t *testing.T) {
	deep := strings.Repeat("d/", maxDepth+1) + "x"
	loop := []entry{symlink("a", "b"), symlink("b", "a"), file("a/x", "")}
	huge := rawHeader(t, tar.Header{Typeflag: tar.TypeReg, Name: "huge", Size: 1 << 50})
	for name, c := range map[string]struct {
		archive []byte
		says    string
	}{
		"climbing name":               {testLayer(t, file("../../etc/passwd", "x")), "climbs"},
		"climbing in the middle":      {testLayer(t, file("a/../../b", "x")), "climbs"},
		"climbing whiteout":           {testLayer(t, file("../.wh.etc", "")), "climbs"},
		"whiteout of dots":            {testLayer(t, file("a/.wh...", "")), "hides nothing"},
		"hard link out":               {testLayer(t, hardlink("x", "../../etc/shadow")), "climbs"},
		"hard link to nothing":        {testLayer(t, hardlink("x", "/etc/shadow")), "does not exist"},
		"hard link to itself":         {testLayer(t, hardlink("x", "x")), "does not exist"},
		"hard link to a directory":    {testLayer(t, dir("d"), hardlink("x", "d")), "directory"},
		"device":                      {testLayer(t, entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Devmajor: 8}}), "device"},
		"device beside dev":           {testLayer(t, entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/../mem", Devmajor: 1}}), "climbs"},
		"link loop":                   {testLayer(t, loop...), "symbolic links"},
		"file below a file":           {testLayer(t, file("f", "x"), file("f/y", "x")), "not a directory"},
		"root is a file":              {testLayer(t, file(".", "x")), ""},
		"too deep":                    {testLayer(t, file(deep, "x")), "deeper"},
		"component too long":          {testLayer(t, file(strings.Repeat("n", 256), "x")), "longer"},
		"link target too long":        {testLayer(t, symlink("x", strings.Repeat("t", 5000))), "target"},
		"size that cannot be":         {huge, ""},
		"many bytes of zeros":         {bomb(t, 65<<20), "limit"},
		"many files":                  {testLayer(t, manyFiles(1100)...), "more than 1000 files"},
		"empty":                       {nil, "empty"},
		"not an archive":              {bytes.Repeat([]byte("nonsense"), 1000), "tar"},
		"cut off":                     {testLayer(t, file("a", strings.Repeat("x", 5000)))[:3000], "unexpected EOF"},
		"cut off, compressed":         {gzipped(t, testLayer(t, file("a", strings.Repeat("x", 5000))))[:50], ""},
		"owner out of range":          {testLayer(t, entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "d", Uid: 1 << 40, Format: tar.FormatPAX}}), "out of range"},
		"compressed with huge window": {hugeWindow(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(t.TempDir(), Options{Limits: Limits{Bytes: 64 << 20, Entries: 1000}})
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Import(context.Background(), bytes.NewReader(c.archive), ImportOptions{Name: "hostile"})
			if !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v", err)
			}
			nothingLeft(t, s)
		})
	}
}

// nothingLeft checks that a failure left no trace.
func nothingLeft(t *testing.T, s *Store) {
	t.Helper()
	for _, folder := range folders {
		if left, _ := filepath.Glob(s.path(folder, "*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

// rawHeader is the header of a file whose contents do not follow.
func rawHeader(t *testing.T, h tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	return append(b.Bytes(), make([]byte, 4096)...)
}

func manyFiles(n int) []entry {
	var out []entry
	for i := range n {
		out = append(out, file(fmt.Sprint(i), ""))
	}
	return out
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// bomb is a small archive of one large file of zeros.
func bomb(t *testing.T, size int64) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(w, zeroReader{}, size); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// hugeWindow is a zstd frame that asks for more memory than we give.
func hugeWindow() []byte {
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff}, make([]byte, 100)...)
}

// conformance: FR2.2
func TestFullDiskIsReportedAndNothingIsLost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=3m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	s, err := Open(filepath.Join(mnt, "images"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	small, err := s.Import(ctx, bytes.NewReader(testLayer(t, file("a", "1"))), ImportOptions{Name: "small"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Import(ctx, bytes.NewReader(testLayer(t, file("big", strings.Repeat("x", 4<<20)))), ImportOptions{Name: "small"})
	if !sandbox.Is(err, sandbox.Exhausted) || !errors.Is(err, syscall.ENOSPC) || sandbox.HintOf(err) == "" {
		t.Errorf("import: %v", err)
	}
	r := newRegistry(t)
	r.push(t, "big", noise(t, 4<<20))
	if _, err := s.Pull(ctx, r.host+"/big", RegistryOptions{}); !sandbox.Is(err, sandbox.Exhausted) {
		t.Errorf("pull: %v", err)
	}
	if _, err := s.Prune(ctx, nil, true); err != nil {
		t.Fatal(err)
	}
	if still, err := s.Get("small"); err != nil || still.ID != small.ID || !strings.Contains(rootDescription(t, still), "/a") {
		t.Errorf("the image that was there: %+v, %v", still, err)
	}
	if left, _ := filepath.Glob(s.path("tmp", "*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
