// Package microvmtest gives tests of microVMs what those are made of: a kernel, a
// root, an overlay disk, and QEMU on its own, without the runtime.
package microvmtest

import (
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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
	return path, makeRoot(path, tools)
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

// PythonRoot makes an EROFS image that has the distribution's Python besides what
// Root has. It skips where there is none.
func PythonRoot(tb testing.TB) string {
	tb.Helper()
	tb.Setenv("PATH", "/usr/bin:/bin:"+os.Getenv("PATH")) // others are scripts that look for one
	lib, err := exec.Command("python3", "-c", "import sysconfig; print(sysconfig.get_path('stdlib'), end='')").Output()
	if err != nil {
		tb.Skipf("needs python3: %v", err)
	}
	path := filepath.Join(tb.TempDir(), "python.erofs")
	if err := makeRoot(path, append(slices.Clone(tools), "python3"), string(lib)); err != nil {
		tb.Fatal(err)
	}
	return path
}

// left lists what is not taken from Python's library: it is large, and for other uses.
var left = []string{"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "tkinter"}

// addTree reads the regular files of a directory as those of /usr/lib.
func addTree(files map[string][]byte, dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && (slices.Contains(left, e.Name()) || strings.HasPrefix(e.Name(), "config-")) {
			return fs.SkipDir
		}
		if !e.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		files["/usr/lib"+strings.TrimPrefix(path, filepath.Dir(dir))] = data
		return err
	})
}

// makeRoot makes an image of programs of the host and of directories that become
// ones of /usr/lib.
func makeRoot(path string, programs []string, libs ...string) error {
	files, err := guesttest.Programs(programs...)
	if err != nil {
		return err
	}
	for _, lib := range libs {
		if err := addTree(files, lib); err != nil {
			return err
		}
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
