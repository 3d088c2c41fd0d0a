package gvisor

import (
	"archive/tar"
	"bytes"
	"io"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzFilterLayer feeds what a sentry in the guest's hands may send. Whatever it
// is, the layer has clean names and nothing of ours.
func FuzzFilterLayer(f *testing.F) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "./a/", Mode: 0o755, PAXRecords: map[string]string{opaqueRecord: "y"}},
		{Typeflag: tar.TypeReg, Name: "./a/b", Mode: 0o644, Size: 3},
		{Typeflag: tar.TypeLink, Name: "./a/c", Linkname: "./a/b"},
		{Typeflag: tar.TypeChar, Name: "./a/gone"},
		{Typeflag: tar.TypeReg, Name: "./../../etc/hosts"},
	} {
		if err := w.WriteHeader(h); err != nil {
			f.Fatal(err)
		}
		_, _ = w.Write(make([]byte, h.Size))
	}
	w.Close()
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		if filterLayer(&out, bytes.NewReader(data)) != nil {
			return
		}
		for tr := tar.NewReader(&out); ; {
			h, err := tr.Next()
			if err == io.EOF {
				return
			}
			if err != nil {
				t.Fatalf("the layer is malformed: %v", err)
			}
			name := strings.TrimSuffix(h.Name, "/")
			if path.IsAbs(name) || name != path.Clean(name) || name == ".." || strings.HasPrefix(name, "../") {
				t.Errorf("entry %q", h.Name)
			}
			if ours(name) {
				t.Errorf("entry %q is ours", h.Name)
			}
		}
	})
}

// FuzzManifest feeds what a snapshot from elsewhere may hold.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"format":1,"gvisor":"v1","arch":"amd64","images":{"agent":"00.erofs"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(data)
		if err != nil {
			return
		}
		for _, name := range m.Images.list() {
			if name != filepath.Base(name) || name == "." || name == ".." || name == "" {
				t.Errorf("image %q", name)
			}
		}
	})
}
