package worktree

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) {
	if IsReexec() {
		Main()
	}
	os.Exit(guesttest.Main(m))
}

// gitIn runs git as a user would and returns what it prints.
func gitIn(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=User", "GIT_AUTHOR_EMAIL=user@example.org", "GIT_COMMITTER_NAME=User", "GIT_COMMITTER_EMAIL=user@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// put writes a file below dir.
func put(t testing.TB, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// newRepo makes a user's repository with one commit.
func newRepo(t testing.TB) string {
	dir := t.TempDir()
	gitIn(t, dir, "init", "-q", "-b", "main")
	put(t, dir, "README.md", "hello\n")
	put(t, dir, "src/main.go", "package main\n")
	put(t, dir, ".gitignore", "*.log\n.env\nbuild/\n")
	gitIn(t, dir, "add", "-A")
	gitIn(t, dir, "commit", "-q", "-m", "first")
	return dir
}

// open opens a runtime; a test that may not make namespaces is skipped.
func open(t testing.TB, dir string) *Runtime {
	t.Helper()
	r, err := New(Config{Dir: dir, Guest: guesttest.Binary(t)})
	if sandbox.Is(err, sandbox.Denied) {
		t.Skipf("no privilege: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func specOf(repo string) sandbox.Spec {
	return sandbox.Spec{Root: sandbox.Root{Kind: sandbox.RootRepository, Path: repo}, Network: sandbox.NetworkNone}
}

// conformance: FR1.4
func TestWorktreeKeepsTheRuntimeContract(t *testing.T) {
	repo := newRepo(t) // one for all, so that snapshots can move between runtimes
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
		dir := t.TempDir()
		r := open(t, dir)
		return runtimetest.Subject{
			Runtime: r,
			Spec:    specOf(repo),
			Dir:     Workdir,
			Reopen: func(t *testing.T) sandbox.Runtime {
				// A crash would free the lock and leave all else.
				if err := unix.Flock(int(r.lock.Fd()), unix.LOCK_UN); err != nil {
					t.Fatal(err)
				}
				r = open(t, dir)
				return r
			},
			Kill: func(t *testing.T, id string) {
				r.mu.Lock()
				pid := r.boxes[id].rec.PID
				r.mu.Unlock()
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
			Removable: Workdir + "/README.md",
			Traces:    func(t *testing.T) []string { return traces(t, r, repo) },
		}
	})
}

// traces lists what a runtime's sandboxes have on the host.
func traces(t *testing.T, r *Runtime, repo string) []string {
	var all []string
	entries, err := os.ReadDir(filepath.Join(r.dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, "directory "+e.Name())
	}
	if r.cgroups != nil {
		for _, id := range r.cgroups.list() {
			all = append(all, "control group "+id)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, r.dir) {
			all = append(all, "mount "+line)
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range procs {
		if text, err := os.ReadFile(name); err == nil && strings.Contains(string(text), guestPath) {
			dir := filepath.Dir(name)
			if cgroup, err := os.ReadFile(dir + "/cgroup"); err == nil && r.cgroups != nil && strings.Contains(string(cgroup), r.cgroups.prefix) {
				all = append(all, fmt.Sprintf("process %s", filepath.Base(dir)))
			}
		}
	}
	return append(all, strings.Fields(gitIn(t, repo, "for-each-ref", "--format=%(refname)", r.ref))...)
}
