package image

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// small keeps fuzzing fast.
var small = Limits{Bytes: 1 << 20, Entries: 200}

// FuzzLayers applies two layers of any bytes. What is accepted must be written
// and read back as it was.
func FuzzLayers(f *testing.F) {
	f.Add(testLayer(f, dir("d"), file("d/a", "1"), symlink("l", "d"), hardlink("h", "d/a")), testLayer(f, file("d/.wh.a", ""), file("l/b", "2"), file("d/.wh..wh..opq", "")))
	f.Add(testLayer(f, symlink("a", "b"), symlink("b", "/a/../a")), testLayer(f, file("a/x", "")))
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		u, err := newUnpacker(t.TempDir(), small, true)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		for n, layer := range [][]byte{lower, upper} {
			// One of them is read in place, the other through the spool.
			r := bytes.NewReader(layer)
			var at io.ReaderAt
			if n == 0 {
				at = r
			}
			if err := u.addTar(context.Background(), r, at); err != nil {
				return
			}
		}
		var out bytes.Buffer
		if err := writeTar(&out, u.tree, nil); err != nil {
			t.Skip(err) // a file that is cut off
		}
		roundTrip(t, u.tree)
	})
}

// roundTrip writes a tree and reads it back.
func roundTrip(t *testing.T, tr *tree) {
	t.Helper()
	path := write(t, tr)
	f, err := os.Open(path)
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
	sameTree(t, describe(t, back.tree), describe(t, tr))
}

// FuzzImport feeds any bytes to everything that recognises archives.
func FuzzImport(f *testing.F) {
	s, err := Open(f.TempDir(), Options{Limits: small})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := s.Import(context.Background(), bytes.NewReader(testLayer(f, file("a", "b"))), ImportOptions{Name: "seed"}); err != nil {
		f.Fatal(err)
	}
	var archive bytes.Buffer
	if err := s.Export(context.Background(), "seed", &archive); err != nil {
		f.Fatal(err)
	}
	f.Add(archive.Bytes())
	f.Add(testLayer(f, file("manifest.json", `[{"Config":"c","Layers":["l"]}]`), file("c", `{"rootfs":{"diff_ids":["sha256:00"]}}`)))
	f.Add(testLayer(f, file("index.json", `{"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:00"}]}`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := s.Import(context.Background(), bytes.NewReader(b), ImportOptions{Name: "fuzz"})
		if err == nil {
			if _, err := s.Get("fuzz"); err != nil {
				t.Error(err)
			}
		}
		if left, _ := filepath.Glob(s.path("tmp", "*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
}

// FuzzReadRoot reads damaged roots, which must fail and not crash.
func FuzzReadRoot(f *testing.F) {
	u, err := unpack(f, testLayer(f, dir("d"), file("d/a", "1"), symlink("l", "d"), hardlink("h", "d/a")))
	if err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(write(f, u.tree))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := newUnpacker(t.TempDir(), small, true)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		if u.addEROFS(bytes.NewReader(b), int64(len(b))) == nil {
			_ = describe(t, u.tree)
		}
	})
}

// FuzzDockerfile parses any text and expands every word.
func FuzzDockerfile(f *testing.F) {
	f.Add("# escape=`\nFROM a AS b\nRUN <<EOF\nx\nEOF\nCOPY --from=b [\"a\", \"b\"]\nENV A=${B:-\"c $D\"} E='f'\n")
	f.Add("ARG A=1\nFROM ${A:+x}\nADD --chown=a:b c d/\nLABEL a b c\nSHELL [\"a\"]\nRUN x \\\n# c\n y\n")
	f.Fuzz(func(t *testing.T, text string) {
		recipe, err := ParseDockerfile(strings.NewReader(text))
		if err != nil {
			return
		}
		if len(recipe.Stages) == 0 {
			t.Error("no stage and no error")
		}
		st := &state{config: Config{Env: []string{"A=1", "B=${C}"}, Labels: map[string]string{}}}
		for _, stage := range recipe.Stages {
			for _, step := range stage.Steps {
				if step.Line < 1 || step.Op == "" {
					t.Errorf("step %+v", step)
				}
				if step, err := st.expand(step); err == nil && len(step.Args) > 0 && step.Op != OpRun && step.Op != OpCopy && step.Op != OpAdd && step.Op != OpArg && step.Op != OpWorkdir {
					_ = st.configure(step)
				}
			}
		}
	})
}

// FuzzPlatform chooses from any index.
func FuzzPlatform(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"platform":{"os":"linux","architecture":"arm64","variant":"v8"}},{}]}`), "linux/arm64")
	f.Fuzz(func(_ *testing.T, text []byte, platform string) {
		if index, err := v1.ParseIndexManifest(bytes.NewReader(text)); err == nil {
			_, _ = choosePlatform(*index, platform)
		}
	})
}
