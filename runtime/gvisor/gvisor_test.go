package gvisor_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if gvisor.IsReexec() {
		gvisor.Main()
	}
	unix.Umask(0) // users other than root inside write to the tests' directories
	os.Exit(m.Run())
}

// guest builds the agent once.
var guest = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-guest-")
	if err != nil {
		return "", err
	}
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
	path, err := guest()
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

// kill ends a sandbox's sentry from outside.
func kill(t *testing.T, r *gvisor.Runtime, id string) {
	t.Helper()
	if err := unix.Kill(r.SentryPID(id), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}
