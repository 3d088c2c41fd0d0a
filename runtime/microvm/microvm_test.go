package microvm_test

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	unix.Umask(0) // users other than root inside write to the tests' directories
	code := m.Run()
	for _, dir := range made {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// made is the directories that outlive single tests.
var made []string

// shared makes a directory that lasts for all tests.
func shared(pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err == nil {
		made = append(made, dir)
	}
	return dir, err
}

// agentPath builds the agent once.
var agentPath = sync.OnceValues(func() (string, error) {
	dir, err := shared("atoll-guest-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "guest")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/atoll-run/atoll/cmd/atoll-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest agent: %w\n%s", err, out)
	}
	return path, nil
})

// cache is shared by all runtimes of the tests, so that templates are made once.
var cache = sync.OnceValues(func() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return shared("atoll-cache-")
	}
	// Kernels are kept for the next run, since fetching one takes longest.
	dir = filepath.Join(dir, "atoll-test-microvm")
	return dir, os.MkdirAll(dir, 0o700)
})

// open makes a runtime in dir.
func open(t testing.TB, dir string, edits ...func(*microvm.Config)) *microvm.Runtime {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: control groups and network namespaces of machines")
	}
	agent, err := agentPath()
	if err != nil {
		t.Fatal(err)
	}
	common, err := cache()
	if err != nil {
		t.Fatal(err)
	}
	cfg := microvm.Config{Dir: dir, Guest: agent, Cache: common, Defaults: sandbox.Resources{Memory: 192 << 20, Disk: 256 << 20}}
	if os.Getenv("ATOLL_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	for _, edit := range edits {
		edit(&cfg)
	}
	r, err := microvm.New(t.Context(), cfg)
	if sandbox.Is(err, sandbox.Unsupported) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// spec returns a spec that works, without network.
func spec(t testing.TB, id string) sandbox.Spec {
	t.Helper()
	path := os.Getenv("ROOT")
	return sandbox.Spec{ID: id, Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: path, Digest: "blake3:test"}, Network: sandbox.NetworkNone}
}

// conformance: FR1.1 FR1.4 FR2.5 FR5.1 FR5.2 FR5.3
func TestConformance(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
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
			Removable: "/etc/debian_version",
			Dir:       "/tmp",
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
	files, _ := filepath.Glob(filepath.Join(dir, "s", "*"))
	var out []string
	for _, f := range files {
		out = append(out, strings.TrimPrefix(f, dir))
	}
	return out
}
