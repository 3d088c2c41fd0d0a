// Package microvmtest gives tests of microVMs what those are made of: a kernel, a
// root, an overlay disk, and QEMU on its own, without the runtime.
package microvmtest

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/erofs/go-erofs"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/runtime/microvm/kernel"
)

// cacheDir is kept from one run of tests to the next, since a kernel takes long to fetch.
func cacheDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, "atoll-test", "kernel")
}

// Kernel returns the distribution's kernel with the agent of this source tree.
func Kernel(tb testing.TB) kernel.Kernel {
	tb.Helper()
	k, err := kernel.Fetch(tb.Context(), kernel.Options{
		Dir: cacheDir(tb), Guest: guesttest.Binary(tb), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// tools is what the root has.
var tools = []string{
	"sh", "bash", "cat", "chmod", "cksum", "cp", "cut", "date", "dd", "df", "echo", "env", "find", "grep", "head", "hostname", "id", "ip", "kill", "ln", "ls",
	"mkdir", "mkfifo", "mv", "od", "printf", "ps", "readlink", "rm", "sed", "seq", "setsid", "sha256sum", "sleep", "stat", "sync", "tail", "touch",
	"tr", "true", "uname", "wc", "yes",
}

var root = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-root-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "root.erofs")
	return path, makeRoot(path)
})

// Root returns the path of an EROFS image with a shell and a few tools of the
// host's. Main removes it.
func Root(tb testing.TB) string {
	tb.Helper()
	path, err := root()
	if err != nil {
		tb.Fatal(err)
	}
	rootMade = true
	return path
}

var rootMade bool

// Main runs the tests of a package, for its TestMain, and removes what was made.
func Main(m *testing.M) int {
	code := guesttest.Main(m)
	if rootMade {
		if path, err := root(); err == nil {
			os.RemoveAll(filepath.Dir(path))
		}
	}
	return code
}

func makeRoot(path string) error {
	files := map[string][]byte{}
	for _, tool := range tools {
		from, err := exec.LookPath(tool)
		if err != nil {
			continue // the tests use what every host has
		}
		data, err := addELF(files, from)
		if err != nil {
			return fmt.Errorf("%s: %w", tool, err)
		}
		files["/usr/bin/"+tool] = data
	}
	dirs := map[string]bool{"/etc": true, "/root": true, "/tmp": true, "/proc": true, "/sys": true, "/dev": true, "/run": true}
	for name := range files {
		for d := filepath.Dir(name); d != "/"; d = filepath.Dir(d) {
			dirs[d] = true
		}
	}
	files["/etc/passwd"] = []byte("root:x:0:0:root:/root:/bin/bash\n")
	files["/etc/group"] = []byte("root:x:0:\n")
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	w := erofs.Create(out, erofs.WithBlockSize(4096), erofs.WithBuildTime(0, 0), erofs.WithTempDir(filepath.Dir(path)))
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		if err := errors.Join(w.Mkdir(dir, fs.ModeDir|0o755), stamp(w, dir)); err != nil {
			return err
		}
	}
	if err := errors.Join(w.Symlink("usr/bin", "/bin"), stamp(w, "/bin")); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f, err := w.Create(name)
		if err != nil {
			return err
		}
		if _, err := f.Write(files[name]); err != nil {
			return err
		}
		if err := errors.Join(f.Chmod(0o755), f.Close(), stamp(w, name)); err != nil {
			return err
		}
	}
	return w.Close()
}

func stamp(w *erofs.Writer, name string) error {
	return errors.Join(w.Chown(name, 0, 0), w.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0)))
}

// addELF returns a program or library and adds the libraries that it needs under
// the paths where the loader looks for them.
func addELF(files map[string][]byte, path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := elf.Open(path)
	if errors.As(err, new(*elf.FormatError)) {
		return data, nil // a script
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name := make([]byte, p.Filesz-1)
			if _, err := p.ReadAt(name, 0); err != nil {
				return nil, err
			}
			if files[string(name)], err = os.ReadFile(string(name)); err != nil {
				return nil, err
			}
		}
	}
	for _, lib := range needed {
		for _, pattern := range []string{"/lib/*-linux-gnu/", "/usr/lib/*-linux-gnu/", "/lib64/", "/usr/lib64/"} {
			found, err := filepath.Glob(pattern + lib)
			if err != nil {
				return nil, err
			}
			if len(found) == 0 || files[found[0]] != nil {
				continue
			}
			files[found[0]] = []byte{}
			if files[found[0]], err = addELF(files, found[0]); err != nil {
				return nil, err
			}
			break
		}
	}
	return data, nil
}
