package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/worktree"
	"github.com/atoll-run/atoll/sandbox"
)

// fill takes all space of a directory's file system, to the last byte.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := bytes.Repeat([]byte{1}, 1<<20); len(block) > 0; {
		if _, err = f.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
}

// withBase gives a home an image named base, so that none is built.
func withBase(t *testing.T, h Home) {
	t.Helper()
	images, err := image.Open(h.Images(), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}), w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := images.Import(t.Context(), &archive, image.ImportOptions{Name: image.BaseName}); err != nil {
		t.Fatal(err)
	}
}

// newRepository makes a git repository with one commit.
func newRepository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, args := range [][]string{
		{"init", "-q"}, {"-c", "user.name=u", "-c", "user.email=u@example.org", "commit", "-q", "--allow-empty", "-m", "first"},
	} {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	return dir
}

// conformance: FR5.1
func TestADaemonStartsOnAFullDiskAndMakesRoom(t *testing.T) {
	for _, name := range []string{"with its reserve", "without"} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			cfg.Runtimes = []string{worktree.Name}
			disk := string(cfg.Home)
			if err := unix.Mount("small", disk, "tmpfs", 0, "size=256m"); err != nil {
				t.Skipf("needs the right to mount: %v", err)
			}
			t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
			withBase(t, cfg.Home)
			_, stop := serve(t, cfg)
			stop()
			p, err := Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			sb, err := p.Node.Create(t.Context(), node.CreateRequest{Image: newRepository(t), Network: sandbox.NetworkNone})
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(cfg.Home.reserveFile()); err != nil {
				t.Fatal(err)
			}
			if name == "without" {
				if err := os.Remove(cfg.Home.reserveFile()); err != nil {
					t.Fatal(err)
				}
			}
			fill(t, disk)

			ep, stop := serve(t, cfg)
			if got, err := cfg.Home.Endpoint(); err != nil || got != ep {
				t.Errorf("the endpoint is %v, %v", got, err)
			}
			key, err := os.ReadFile(cfg.Home.Credentials())
			if err != nil {
				t.Fatal(err)
			}
			ask := func(method, path string) int {
				req, err := http.NewRequestWithContext(context.Background(), method, ep.URL+path, nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("X-API-Key", strings.TrimSpace(string(key)))
				res, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				return res.StatusCode
			}
			if got := ask("GET", "/sandboxes/"+sb.ID); got != 200 {
				t.Errorf("looking at the sandbox: %d", got)
			}
			if got := ask("DELETE", "/sandboxes/"+sb.ID); got != 204 {
				t.Errorf("removing the sandbox: %d", got)
			}
			stop()
			if err := os.Remove(filepath.Join(disk, "fill")); err != nil {
				t.Fatal(err)
			}
			p, err = Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if left, err := p.Node.Get(t.Context(), sb.ID); err == nil && left.State == sandbox.Running {
				t.Errorf("the sandbox is still there: %s", left.State)
			}
			if err := errors.Join(p.Node.Shutdown(t.Context()), p.closeAll()); err != nil {
				t.Error(err)
			}
		})
	}
}
