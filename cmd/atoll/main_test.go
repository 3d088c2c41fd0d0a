package main

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

	"github.com/atoll-run/atoll/guest/guesttest"
)

// testHome holds everything that the tests make; empty until one needs it.
var testHome string

func TestMain(m *testing.M) {
	code := guesttest.Main(m)
	if testHome != "" {
		if path, err := program(); err == nil {
			down := exec.Command(path, "down")
			down.Env = environment(filepath.Join(testHome, "node"))
			_ = down.Run() // fails when no test needed the daemon
		}
		_ = os.RemoveAll(testHome)
	}
	os.Exit(code)
}

// environment is ours, for an atoll with its state in home.
func environment(home string) []string {
	env := []string{"ATOLL_HOME=" + home}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "ATOLL_") {
			env = append(env, e)
		}
	}
	return env
}

// program returns the path of an atoll: the one in ATOLL_BIN, or one that is
// built here, without cgo as sandboxes' kernels need it, with the guest agent
// and the sentry beside it.
var program = sync.OnceValues(func() (path string, err error) {
	if testHome, err = os.MkdirTemp("", "atoll-cli-"); err != nil {
		return "", err
	}
	if path := os.Getenv("ATOLL_BIN"); path != "" {
		return path, nil
	}
	path = filepath.Join(testHome, "atoll")
	build := exec.Command("go", "build", "-o", testHome+"/", ".", "../atoll-sentry")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return path, os.Symlink(os.Getenv("ATOLL_GUEST"), filepath.Join(testHome, guestName))
})

// cli runs atoll with one state directory.
type cli struct {
	t    *testing.T
	home string
}

// newCLI returns a command line without a daemon.
func newCLI(t *testing.T) *cli {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("sandboxes with limits and networks need root")
	}
	t.Setenv("ATOLL_GUEST", guesttest.Binary(t))
	if _, err := program(); err != nil {
		t.Fatal(err)
	}
	home, err := os.MkdirTemp(testHome, "home-")
	if err != nil {
		t.Fatal(err)
	}
	return &cli{t, home}
}

var startNode sync.Once

// newNode returns a command line with a daemon, which all tests share. The
// sandboxes that the test makes are removed after it.
func newNode(t *testing.T) *cli {
	t.Helper()
	c := newCLI(t)
	c.home = filepath.Join(testHome, "node")
	startNode.Do(func() {
		up := c.command(t, "up", "-d", "--addr", "127.0.0.1:0", "--prewarm", "0")
		if out, err := up.CombinedOutput(); err != nil {
			t.Fatalf("atoll up: %v: %s", err, out)
		}
	})
	t.Cleanup(func() { c.ok("rm", "--all", "-f") })
	return c
}

// command is not bound to the test's context, which has ended when cleaning up.
func (c *cli) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), path, args...)
	cmd.Env = environment(c.home)
	return cmd
}

// result is how a command ended.
type result struct {
	code        int
	out, errors string
}

func (c *cli) run(stdin io.Reader, args ...string) result {
	c.t.Helper()
	cmd := c.command(c.t, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("atoll %q: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// ok runs a command that must succeed, and returns its output without the last
// line's end.
func (c *cli) ok(args ...string) string {
	c.t.Helper()
	r := c.run(nil, args...)
	if r.code != 0 {
		c.t.Fatalf("atoll %q ended with %d: %s", args, r.code, r.errors)
	}
	return strings.TrimSuffix(r.out, "\n")
}

// fails runs a command that must end with a code and say something.
func (c *cli) fails(code int, say string, args ...string) {
	c.t.Helper()
	if r := c.run(nil, args...); r.code != code || !strings.Contains(strings.ToLower(r.errors), strings.ToLower(say)) {
		c.t.Errorf("atoll %q ended with %d, not %d: %s", args, r.code, code, r.errors)
	}
}
