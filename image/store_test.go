package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// importText imports a root with one file.
func importText(t testing.TB, s *Store, name, text string) Image {
	t.Helper()
	i, err := s.Import(context.Background(), bytes.NewReader(testLayer(t, file("text", text))), ImportOptions{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// checkWhole verifies every record and root of a store.
func checkWhole(t *testing.T, s *Store) []Image {
	t.Helper()
	list, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		f, err := os.Open(i.Root.Path)
		if err != nil {
			t.Error(err)
			continue
		}
		hash := blake3.New()
		_, err = io.Copy(hash, f)
		_ = f.Close()
		if got := fmt.Sprintf("blake3:%x", hash.Sum(nil)); err != nil || got != i.Root.Digest {
			t.Errorf("%v: root is %s, record says %s, %v", i.Names, got, i.Root.Digest, err)
		}
	}
	return list
}

// conformance: FR2.2
func TestEqualContentsShareOneRoot(t *testing.T) {
	s := openStore(t)
	a, b, c := importText(t, s, "a", "same"), importText(t, s, "b:1", "same"), importText(t, s, "c", "other")
	if a.Root != b.Root || a.ID != b.ID || a.Root == c.Root {
		t.Errorf("a %v, b %v, c %v", a.Root, b.Root, c.Root)
	}
	list := checkWhole(t, s)
	if len(list) != 2 || fmt.Sprint(list[0].Names) != "[a:latest b:1]" {
		t.Errorf("list %+v", list)
	}
	for _, ref := range []string{"a", "a:latest", "docker.io/library/a", a.ID, a.ID[7:19]} {
		if got, err := s.Get(ref); err != nil || got.ID != a.ID || len(got.Names) != 2 {
			t.Errorf("%s: %+v, %v", ref, got, err)
		}
	}
	for _, ref := range []string{"", "none", "a:2", "sha256:", "zzzz"} {
		if got, err := s.Get(ref); !sandbox.Is(err, sandbox.NotFound) {
			t.Errorf("%q: %+v, %v", ref, got, err)
		}
	}
}

func TestHostImageIsAlwaysThere(t *testing.T) {
	s := openStore(t)
	i, err := s.Get("host")
	if err != nil || i.Root.Kind != sandbox.RootHost || i.Root.Path != "" {
		t.Errorf("%+v, %v", i, err)
	}
	if err := s.Remove("host"); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("remove: %v", err)
	}
	_, err = s.Import(context.Background(), bytes.NewReader(testLayer(t, file("a", ""))), ImportOptions{Name: "host"})
	if !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("import: %v", err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("list %v, %v", list, err)
	}
}

func TestTagMovesFromImageToImage(t *testing.T) {
	s := openStore(t)
	a, b := importText(t, s, "a", "1"), importText(t, s, "b", "2")
	for _, i := range []Image{a, b} {
		if _, err := s.Tag(i.ID, "current"); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Get("current"); err != nil || got.ID != i.ID {
			t.Errorf("current is %v, %v", got.ID, err)
		}
	}
	for _, name := range []string{"host", "", "a b", "-x", strings.Repeat("n", 600), "new\nline"} {
		if _, err := s.Tag("a", name); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// conformance: FR2.2
func TestPruneKeepsWhatIsReferenced(t *testing.T) {
	r, s := newRegistry(t), openStore(t)
	ctx := context.Background()
	r.push(t, "pulled", testLayer(t, file("p", "1")))
	kept, used, gone := importText(t, s, "kept", "1"), importText(t, s, "used", "2"), importText(t, s, "gone", "3")
	pulled, err := s.Pull(ctx, r.host+"/pulled", RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"used", gone.ID} {
		if err := s.Remove(name); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(name); !sandbox.Is(err, sandbox.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p, err := s.Prune(ctx, []string{used.Root.Digest}, true)
	if err != nil || p.Roots != 1 || p.Bytes == 0 || p.Blobs != 0 {
		t.Errorf("pruned %+v, %v", p, err)
	}
	for i, there := range map[*Image]bool{&kept: true, &used: true, &gone: false, &pulled: true} {
		if _, err := os.Stat(i.Root.Path); (err == nil) != there {
			t.Errorf("%v: %v", i.Names, err)
		}
	}
	if err := s.Remove(r.host + "/pulled"); err != nil {
		t.Fatal(err)
	}
	if p, err := s.Prune(ctx, nil, true); err != nil || p.Roots != 2 || p.Blobs != 1 {
		t.Errorf("pruned %+v, %v", p, err)
	}
	if list := checkWhole(t, s); len(list) != 1 {
		t.Errorf("left %+v", list)
	}
}

// Imports, removals and prunes of two stores on one directory at once: every
// image that is listed in the end is whole.
func TestStoresOnOneDirectoryWorkSideBySide(t *testing.T) {
	first := openStore(t)
	second, err := Open(first.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for n := range 4 {
		group.Go(func() {
			s := []*Store{first, second}[n%2]
			for i := range 15 {
				name := fmt.Sprintf("i%d", i%3)
				importText(t, s, name, fmt.Sprint(i%5))
				if n < 2 {
					if err := s.Remove(name); err != nil && !sandbox.Is(err, sandbox.NotFound) {
						t.Error(err)
					}
				} else if _, err := s.Prune(context.Background(), nil, false); err != nil {
					t.Error(err)
				}
				if n == 0 {
					if _, err := Open(first.dir, Options{}); err != nil { // sweeps
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()
	checkWhole(t, first)
	if left, _ := filepath.Glob(first.path("tmp", "*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

const killedDir = "ATOLL_IMAGE_TEST_KILLED"

// TestImportUntilKilled is the process that TestKilledStoreIsWhole kills.
func TestImportUntilKilled(t *testing.T) {
	dir := os.Getenv(killedDir)
	if dir == "" {
		return // run by the other test only
	}
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 100_000; i++ {
		importText(t, s, "image", strings.Repeat(fmt.Sprint(i%7), 2<<20))
		if _, err := s.Prune(context.Background(), nil, false); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			fmt.Println("imported")
		}
	}
}

// conformance: FR2.2
func TestKilledStoreIsWhole(t *testing.T) {
	dir := t.TempDir()
	for range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestImportUntilKilled$", "-test.v")
		cmd.Env = append(os.Environ(), killedDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 4096)
		for !strings.Contains(string(head), "imported") {
			n, err := out.Read(head)
			if err != nil {
				t.Fatalf("%v: %s", err, head[:n])
			}
		}
		if err := cmd.Process.Kill(); err != nil { // somewhere in the second import
			t.Fatal(err)
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) {
			t.Fatalf("the process was not killed: %v", err)
		}
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if list := checkWhole(t, s); len(list) != 1 {
			t.Errorf("images %+v", list)
		}
		if left, _ := filepath.Glob(s.path("tmp", "*")); len(left) > 0 {
			t.Errorf("not swept: %q", left)
		}
	}
}
