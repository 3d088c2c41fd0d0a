package image

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/atoll-run/atoll/sandbox"
)

// importVariety imports a tree with one of everything.
func importVariety(t *testing.T, s *Store) Image {
	t.Helper()
	var b bytes.Buffer
	if err := writeTar(&b, variety(t).tree, nil); err != nil {
		t.Fatal(err)
	}
	config := Config{Env: []string{"A=b"}, User: "7", WorkingDir: "/srv", Entrypoint: []string{"e"}, Cmd: []string{"c"}, ExposedPorts: []string{"80/tcp"}, Labels: map[string]string{"k": "v"}}
	i, err := s.Import(context.Background(), &b, ImportOptions{Name: "variety:1", Config: config})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// conformance: FR2.2
func TestExportedImageImportsAsTheSame(t *testing.T) {
	s, other := openStore(t), openStore(t)
	i := importVariety(t, s)
	file := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Export(context.Background(), "variety:1", f); err != nil {
		t.Fatal(err)
	}
	back, err := other.ImportFile(context.Background(), file, ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if back.ID != i.ID || back.Root.Digest != i.Root.Digest || len(back.Names) != 1 || back.Names[0] != "variety:1" {
		t.Errorf("exported %+v, imported %+v", i, back)
	}
	tag, _ := name.NewTag("variety:1")
	if _, err := tarball.ImageFromPath(file, &tag); err != nil {
		t.Errorf("docker's reader: %v", err)
	}
}

func TestOCILayoutDirectoryImports(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	img := r.push(t, "x", testLayer(t, file("a", "1"), file("b", "2")), testLayer(t, file(".wh.b", "")))
	dir := t.TempDir()
	path, err := layout.FromPath(dir)
	if err != nil {
		path, err = layout.Write(dir, empty.Index)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	i, err := s.ImportFile(context.Background(), dir, ImportOptions{Name: "laid-out"})
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(t, i, "/"); got != "/ 40755 0:0\n/a 100644 0:0 \"1\"\n/srv 40755 0:0" {
		t.Errorf("root:\n%s", got)
	}
	layers, _ := img.Layers()
	digest, _ := layers[0].Digest()
	if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", digest.Hex), testLayer(t, file("evil", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ImportFile(context.Background(), dir, ImportOptions{Name: "forged"}); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a forged layer: %v", err)
	}
}

// conformance: FR2.2
func TestPushedImagePullsAsTheSame(t *testing.T) {
	r, s, other := newRegistry(t), openStore(t), openStore(t)
	i := importVariety(t, s)
	if err := s.Push(context.Background(), "variety:1", r.host+"/pushed:1", RegistryOptions{}); err != nil {
		t.Fatal(err)
	}
	back, err := other.Pull(context.Background(), r.host+"/pushed:1", RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if back.ID != i.ID {
		t.Errorf("pushed %+v, pulled %+v", i, back)
	}
}
