package runtimetest

import (
	"archive/tar"
	"errors"
	"io"
	"path"
	"strings"
	"testing"
)

var changesTests = []test{
	{"changes are an OCI layer", canChanges, testChanges},
	{"a removed file is a whiteout", canChanges, testWhiteout},
	{"any number of files may go and take other names", canChanges, testWhiteouts},
	{"a sandbox that did nothing has next to no changes", canChanges, testNoChanges},
	{"a reader who hangs up ends it", canChanges, testChangesHangUp},
}

// layer reads the changes of a sandbox as a layer; names are as in the archive.
func (b *box) layer() (headers map[string]*tar.Header, contents map[string]string) {
	b.t.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(b.rt.Changes(deadline(b.t), b.id, w)) }()
	headers, contents = map[string]*tar.Header{}, map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			// The error of Changes itself comes after the archive's end.
			if _, err := io.Copy(io.Discard, r); err != nil {
				b.t.Fatalf("Changes: %v", err)
			}
			for name, h := range headers {
				if to := headers[h.Linkname]; h.Typeflag == tar.TypeLink && (to == nil || to.Typeflag != tar.TypeReg) {
					b.t.Errorf("%s is a link to %s, which is no file of the layer", name, h.Linkname)
				}
			}
			return headers, contents
		}
		if err != nil {
			b.t.Fatalf("Changes: %v", err)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if path.IsAbs(name) || name != path.Clean(name) {
			b.t.Errorf("entry %q is not a clean relative name", h.Name)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			b.t.Fatalf("Changes: %v", err)
		}
		headers[name], contents[name] = h, string(data)
	}
}

// find returns the entry that stands for a path relative to the working directory.
func find(t *testing.T, headers map[string]*tar.Header, rel string) string {
	t.Helper()
	for name := range headers {
		if name == rel || strings.HasSuffix(name, "/"+rel) {
			return name
		}
	}
	t.Fatalf("no entry for %s among %d", rel, len(headers))
	return ""
}

func testChanges(t *testing.T, s *suite) {
	b := s.create(t)
	b.must(`mkdir -p made/inner; echo content > made/inner/file; chmod 755 made/inner/file; ln -s inner/file made/link
ln made/inner/file made/hard; echo x > made/shortlived; rm made/shortlived; printf odd > "made/$(printf 'o\ndd')"`)
	headers, contents := b.layer()

	file := find(t, headers, "made/inner/file")
	hard := find(t, headers, "made/hard")
	// Which of two hard links is the file and which the link is free.
	if headers[file].Typeflag == tar.TypeLink {
		file, hard = hard, file
	}
	if h := headers[file]; contents[file] != "content\n" || h.Mode&0o777 != 0o755 || h.Typeflag != tar.TypeReg {
		t.Errorf("%s is %q with mode %o and type %c", file, contents[file], h.Mode, h.Typeflag)
	}
	if h := headers[hard]; h.Typeflag != tar.TypeLink || h.Linkname != file {
		t.Errorf("%s has type %c and leads to %q, want a hard link to %s", hard, h.Typeflag, h.Linkname, file)
	}
	if h := headers[find(t, headers, "made/link")]; h.Typeflag != tar.TypeSymlink || h.Linkname != "inner/file" {
		t.Errorf("the symbolic link has type %c and leads to %q", h.Typeflag, h.Linkname)
	}
	if h := headers[find(t, headers, "made")]; h.Typeflag != tar.TypeDir {
		t.Errorf("the directory has type %c", h.Typeflag)
	}
	if got := contents[find(t, headers, "made/o\ndd")]; got != "odd" {
		t.Errorf("the file with a newline in its name holds %q", got)
	}
	for name := range headers {
		if strings.Contains(name, "shortlived") {
			t.Errorf("a file that came and went is in the layer: %s", name)
		}
	}
}

func testWhiteout(t *testing.T, s *suite) {
	if s.Removable == "" {
		t.Skip("the subject's root has nothing to remove")
	}
	b := s.create(t)
	b.must("rm " + s.Removable)
	headers, _ := b.layer()
	rel := strings.TrimPrefix(s.Removable, "/")
	want := path.Join(path.Dir(rel), ".wh."+path.Base(rel))
	if h := headers[want]; h == nil || h.Size != 0 || h.Typeflag != tar.TypeReg {
		t.Errorf("no whiteout %s among %d entries", want, len(headers))
	}
	if headers[rel] != nil {
		t.Errorf("%s is in the layer though it was removed", rel)
	}
}

func testWhiteouts(t *testing.T, s *suite) {
	if s.Removable == "" {
		t.Skip("the subject's root has nothing to remove")
	}
	b := s.create(t)
	dir := path.Dir(s.Removable)
	b.must("rm " + s.Removable + "; cd " + dir + "; for n in 1 2 3; do echo $n > old$n; mv old$n new$n; done; echo > gone; rm gone; ln new1 other")
	headers, contents := b.layer()
	in := strings.TrimPrefix(dir, "/")
	for _, name := range []string{s.Removable[1:], path.Join(in, "old1"), path.Join(in, "old2"), path.Join(in, "old3"), path.Join(in, "gone")} {
		if h := headers[name]; h != nil {
			t.Errorf("%s is in the layer with type %c though it is gone", name, h.Typeflag)
		}
	}
	if headers[path.Join(in, ".wh."+path.Base(s.Removable))] == nil {
		t.Errorf("no whiteout of %s", s.Removable)
	}
	for _, n := range []string{"2", "3"} {
		if got := contents[path.Join(in, "new"+n)]; got != n+"\n" {
			t.Errorf("new%s holds %q", n, got)
		}
	}
}

func testNoChanges(t *testing.T, s *suite) {
	headers, contents := s.create(t).layer()
	var size int
	for _, c := range contents {
		size += len(c)
	}
	if len(headers) > 64 || size > 1<<20 {
		t.Errorf("an untouched sandbox has %d changed files of %d bytes", len(headers), size)
	}
}

func testChangesHangUp(t *testing.T, s *suite) {
	b := s.create(t)
	b.must("echo x > file")
	if err := s.Runtime.Changes(deadline(t), b.id, failingWriter{}); err == nil {
		t.Error("Changes into a writer that fails succeeded")
	}
	b.must("true")
}
