package gvisor_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/runtime/gvisor/sentry"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if sentry.Wanted() {
		sentry.Main()
	}
	if dir := os.Getenv(makerEnv); dir != "" {
		fmt.Fprintln(os.Stderr, maker(dir))
		os.Exit(1)
	}
	unix.Umask(0) // users other than root inside write to the tests' directories
	code := m.Run()
	for _, dir := range made {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// made is the directories that outlive single tests.
var made []string

// agentPath builds the agent once.
var agentPath = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-guest-")
	if err != nil {
		return "", err
	}
	made = append(made, dir)
	path := filepath.Join(dir, "guest")
	cmd := exec.Command("go", "build", "-o", path, "github.com/atoll-run/atoll/cmd/atoll-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest agent: %w\n%s", err, out)
	}
	return path, nil
})

// open makes a runtime in dir.
func open(t testing.TB, dir string, edits ...func(*gvisor.Config)) *gvisor.Runtime {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: gVisor's control groups and namespaces")
	}
	path, err := agentPath()
	if err != nil {
		t.Fatal(err)
	}
	cfg := gvisor.Config{Dir: dir, Guest: path, Debug: os.Getenv("ATOLL_TEST_GVISOR_DEBUG")}
	for _, edit := range edits {
		edit(&cfg)
	}
	r, err := gvisor.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// conformance: FR1.1 FR1.4 FR5.1 FR5.2 FR5.3
func TestConformanceOnTheHostsRoot(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
		dir := t.TempDir()
		r := open(t, dir)
		return runtimetest.Subject{
			Runtime: r,
			Spec:    sandbox.Spec{Root: sandbox.Root{Kind: sandbox.RootHost}, Network: sandbox.NetworkNone},
			Reopen: func(t *testing.T) sandbox.Runtime {
				r.Abandon()
				r = open(t, dir)
				return r
			},
			Kill:      func(t *testing.T, id string) { kill(t, r, id) },
			Removable: "/home/user/.bashrc",
		}
	})
}

// root makes the tests' EROFS root once.
var root = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-root-")
	if err != nil {
		return "", err
	}
	made = append(made, dir)
	return gvisor.MakeRoot(dir)
})

// erofsSpec returns a spec with the tests' EROFS root and without network.
func erofsSpec(t testing.TB, id string) sandbox.Spec {
	t.Helper()
	path, err := root()
	if err != nil {
		t.Fatal(err)
	}
	return sandbox.Spec{
		ID: id, Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: path, Digest: "blake3:test"}, Network: sandbox.NetworkNone,
	}
}

// conformance: FR1.1 FR1.4 FR5.1 FR5.2 FR5.3
func TestConformanceOnAnEROFSRoot(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
		dir := t.TempDir()
		r := open(t, dir)
		return runtimetest.Subject{
			Runtime: r,
			Spec:    erofsSpec(t, ""),
			Reopen: func(t *testing.T) sandbox.Runtime {
				r.Abandon()
				r = open(t, dir)
				return r
			},
			Kill:      func(t *testing.T, id string) { kill(t, r, id) },
			Removable: "/removable/file",
			Traces:    func(t *testing.T) []string { return traces(t, dir) },
		}
	})
}

// kill ends a sandbox's sentry from outside.
func kill(t *testing.T, r *gvisor.Runtime, id string) {
	t.Helper()
	if err := unix.Kill(r.SentryPID(id), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// traces lists what the sandboxes of a runtime in dir have on this host.
func traces(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if line, err := os.ReadFile(p); err == nil && strings.Contains(string(line), dir) && strings.HasPrefix(string(line), "atoll-") {
			out = append(out, "process "+filepath.Dir(p)+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			out = append(out, "mount "+line)
		}
	}
	prefix := gvisor.Prefix(dir)
	groups, _ := filepath.Glob("/sys/fs/cgroup/" + prefix + "/*")
	v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + prefix + "/*")
	for _, g := range append(groups, v1...) {
		if st, err := os.Stat(g); err == nil && st.IsDir() {
			out = append(out, "control group "+g)
		}
	}
	files, _ := filepath.Glob(filepath.Join(dir, "s", "*"))
	return append(out, files...)
}
