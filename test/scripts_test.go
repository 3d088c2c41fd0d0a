package test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// perScript is how long one script may run.
const perScript = 15 * time.Minute

// skipped is the exit code of a script that cannot run on this machine.
const skipped = 77

// TestScripts runs every executable file of every folder below this one; each
// folder has a node of its own.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("*/*")
	if err != nil {
		t.Fatal(err)
	}
	byDir := map[string][]string{}
	var dirs []string // in the order of their names
	for _, file := range files {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		dir, name := filepath.Split(file)
		if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || strings.HasPrefix(name, "_") {
			continue
		}
		dir = filepath.Clean(dir)
		if byDir[dir] == nil {
			dirs = append(dirs, dir)
		}
		byDir[dir] = append(byDir[dir], name)
	}
	for _, dir := range dirs {
		t.Run(dir, func(t *testing.T) {
			n := startNode(t)
			key, err := n.command("key", "create", "-q").Output()
			if err != nil {
				t.Fatalf("atoll key create: %v", describe(err))
			}
			env := append(n.env, "ATOLL_URL="+n.url,
				"E2B_API_KEY="+strings.TrimSpace(string(key)), "E2B_API_URL="+n.url, "E2B_SANDBOX_URL="+n.url)
			for _, name := range byDir[dir] {
				t.Run(name, func(t *testing.T) { runScript(t, dir, name, env) })
			}
		})
	}
}

// runScript runs one file in its folder, with all its children in a process group
// so that none outlives it.
func runScript(t *testing.T, dir, name string, env []string) {
	tmp, err := os.MkdirTemp("", "script")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	ctx, cancel := context.WithTimeout(t.Context(), perScript)
	defer cancel()
	cmd := exec.CommandContext(ctx, "./"+name)
	cmd.Dir, cmd.Env = dir, append(env, "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "measured: ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.ExitCode() == skipped:
		t.Skip(lastLine(string(out)))
	case errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
		t.Fatalf("cannot be run: %v", err)
	default:
		t.Fatalf("%v\n%s", err, tail(string(out)))
	}
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// describe adds to the error of a command what it printed as its errors.
func describe(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return err.Error() + "\n" + string(exit.Stderr)
	}
	return err.Error()
}
