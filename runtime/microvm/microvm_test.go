package microvm_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if pager.IsReexec() {
		pager.Main()
	}
	if dir := os.Getenv(ownerEnv); dir != "" {
		fmt.Fprintln(os.Stderr, owner(dir))
		os.Exit(1)
	}
	code := microvmtest.Main(m)
	if dir, err := cache(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// cache is shared by all runtimes of the tests, so that templates are made once.
var cache = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-machines-")
	if err != nil {
		return "", err
	}
	return dir, shareKernels(dir)
})

// shareKernels makes a cache take its kernels from where other tests keep theirs.
func shareKernels(dir string) error {
	user, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	kernels := filepath.Join(user, "atoll-test", "kernel")
	if err := os.MkdirAll(kernels, 0o700); err != nil {
		return err
	}
	return os.Symlink(kernels, filepath.Join(dir, "kernel"))
}

// config is of a runtime in dir.
func config(t testing.TB, dir string) microvm.Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: control groups and network namespaces of machines")
	}
	common, err := cache()
	if err != nil {
		t.Fatal(err)
	}
	return microvm.Config{
		Dir: dir, Guest: guesttest.Binary(t), Cache: common, Accelerator: "tcg",
		Defaults: sandbox.Resources{Memory: 160 << 20, Disk: 256 << 20},
	}
}

// open makes a runtime in dir.
func open(t testing.TB, dir string, edits ...func(*microvm.Config)) *microvm.Runtime {
	t.Helper()
	cfg := config(t, dir)
	if os.Getenv("ATOLL_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	for _, edit := range edits {
		edit(&cfg)
	}
	r, err := microvm.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err) // scripts/deps installs QEMU
	}
	return r
}

// start opens a runtime with one sandbox, which end with the test.
func start(t testing.TB, edits ...func(*microvm.Config)) (*microvm.Runtime, sandbox.Spec) {
	t.Helper()
	r, s := open(t, t.TempDir(), edits...), spec(t, "first")
	t.Cleanup(func() { destroyAll(t, r) })
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return r, s
}

// destroyAll removes all sandboxes and closes the runtime.
func destroyAll(t testing.TB, r *microvm.Runtime) {
	t.Helper()
	all, err := r.List(context.Background())
	if err != nil {
		t.Error(err)
	}
	for _, st := range all {
		if err := r.Destroy(context.Background(), st.ID); err != nil {
			t.Error(err)
		}
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// spec returns a spec that works, without network.
func spec(t testing.TB, id string) sandbox.Spec {
	t.Helper()
	return sandbox.Spec{
		ID: id, Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: microvmtest.Root(t), Digest: "blake3:test"}, Network: sandbox.NetworkNone,
	}
}

// sh runs a shell script in a sandbox and returns what it printed.
func sh(t testing.TB, r sandbox.Runtime, id, script string) string {
	t.Helper()
	out, err := run(t.Context(), r, id, script)
	if err != nil {
		t.Fatalf("%s: %q: %v", id, script, err)
	}
	return out
}

func run(ctx context.Context, r sandbox.Runtime, id, script string) (string, error) {
	g := guest.New(func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, id, sandbox.GuestPort) }, guest.Options{})
	defer g.CloseIdle()
	out, err := g.Run(ctx, guest.Command{Args: []string{"/bin/sh", "-c", script}})
	return string(out.Stdout) + string(out.Stderr), err
}

// conformance: FR1.1 FR1.4 FR2.5 FR5.1 FR5.2 FR5.3
func TestConformance(t *testing.T) {
	var parallel sync.Map // tests that say so already: some open a second one
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
		if _, said := parallel.LoadOrStore(t, true); !said {
			t.Parallel() // each has a directory of its own
		}
		dir := t.TempDir()
		r := open(t, dir)
		return runtimetest.Subject{
			Runtime: r,
			Spec:    spec(t, ""),
			Reopen: func(t *testing.T) sandbox.Runtime {
				r.Abandon()
				r = open(t, dir)
				return r
			},
			Kill:      func(t *testing.T, id string) { kill(t, r, id) },
			Removable: "/usr/bin/yes",
			Traces:    func(t *testing.T) []string { return traces(t, dir) },
		}
	})
}

// kill ends a sandbox's monitor from outside.
func kill(t *testing.T, r *microvm.Runtime, id string) {
	t.Helper()
	if err := unix.Kill(r.MonitorPID(id), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// traces lists what the sandboxes of a runtime in dir have on this host.
func traces(t testing.TB, dir string) []string {
	t.Helper()
	out, err := filepath.Glob(filepath.Join(dir, "s", "*"))
	if err != nil {
		t.Fatal(err)
	}
	prefix := microvm.Prefix(dir)
	v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + prefix + "*/*")
	v2, _ := filepath.Glob("/sys/fs/cgroup/" + prefix + "*/*")
	for _, g := range append(v1, v2...) {
		if st, err := os.Stat(g); err == nil && st.IsDir() {
			out = append(out, "control group "+g)
			procs, _ := os.ReadFile(filepath.Join(g, "cgroup.procs"))
			for pid := range strings.FieldsSeq(string(procs)) {
				out = append(out, "process "+pid)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
