// Package test drives the built binary as its users do, see README.md.
package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// How long things may take before a test gives up on them.
const (
	startUp  = 10 * time.Minute // the first node makes the base image
	shutDown = time.Minute
)

// shared is what all tests of this run have in common: made once, by TestMain.
var shared struct {
	root   string // of the repository
	bin    string // the atoll binary
	images string // one store of images, so that the base image is made once
}

func TestMain(m *testing.M) {
	code, err := prepared(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		code = 1
	}
	os.Exit(code)
}

func prepared(m *testing.M) (int, error) {
	root, err := filepath.Abs("..")
	if err != nil {
		return 0, err
	}
	shared.root, shared.bin = root, os.Getenv("ATOLL_BIN")
	if shared.bin == "" {
		if out, err := exec.Command("make", "-s", "-C", root, "build").CombinedOutput(); err != nil {
			return 0, fmt.Errorf("make build: %w\n%s", err, out)
		}
		shared.bin = filepath.Join(root, "bin", "atoll")
	}
	if shared.images, err = os.MkdirTemp("", "images"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(shared.images)
	return m.Run(), nil
}

// A node is a running `atoll up` with a state directory of its own.
type node struct {
	home    string
	url     string   // "http://127.0.0.1:port"
	runtime string   // the only one that it offers; empty: all that it can
	env     []string // for commands that are to find this node
	addr    string   // where it listens
	args    []string // of atoll up

	mu     sync.Mutex
	log    bytes.Buffer // what it printed; guarded by mu
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended
}

// Write appends to the log of the node.
func (n *node) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.Write(p)
}

// startNode starts a node that is removed with all its sandboxes when the test
// ends, and fails the test when something of it is left then.
func startNode(t *testing.T) *node {
	t.Helper()
	return startNodeWith(t, os.Getenv("ATOLL_TEST_RUNTIME"))
}

// startNodeWith is startNode with one runtime; empty: all.
func startNodeWith(t *testing.T, runtime string) *node {
	t.Helper()
	n := newNode(t, runtime, shared.images)
	n.start(t)
	t.Cleanup(func() { n.remove(t) })
	return n
}

// newNode is a node with a store of images that does not run yet.
func newNode(t *testing.T, runtime, images string) *node {
	t.Helper()
	// Paths of sockets are short, so not t.TempDir, which holds the test's name.
	home, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(home) })
	if err := os.Symlink(images, filepath.Join(home, "images")); err != nil {
		t.Fatal(err)
	}
	n := &node{home: home, runtime: runtime, addr: "127.0.0.1:0"}
	n.env = append(os.Environ(),
		"PATH="+filepath.Dir(shared.bin)+":"+os.Getenv("PATH"),
		"ATOLL_HOME="+home, "ATOLL_ROOT="+shared.root)
	return n
}

// start starts the daemon and waits until it answers.
func (n *node) start(t *testing.T) {
	t.Helper()
	args := append([]string{"up"}, n.args...)
	if n.runtime != "" {
		args = append(args, "--runtime", n.runtime)
	}
	n.cmd = exec.Command(shared.bin, args...)
	n.cmd.Env, n.cmd.Stdout, n.cmd.Stderr = append(n.env, "ATOLL_ADDR="+n.addr), n, n
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	n.exited = exited
	go func() {
		_ = n.cmd.Wait()
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), startUp)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !n.answers(ctx) {
		select {
		case <-tick.C:
		case <-n.exited:
			t.Fatalf("atoll up ended before it answered:\n%s", n.tail())
		case <-ctx.Done():
			t.Fatalf("atoll up does not answer:\n%s", n.tail())
		}
	}
}

// answers finds out where the daemon listens and whether it answers there.
func (n *node) answers(ctx context.Context) bool {
	var endpoint struct{ URL string }
	text, err := os.ReadFile(filepath.Join(n.home, "daemon.json"))
	if err != nil || json.Unmarshal(text, &endpoint) != nil {
		return false
	}
	n.url = endpoint.URL
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.url+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode < 300
}

// remove ends every sandbox and the daemon, and checks that nothing is left.
func (n *node) remove(t *testing.T) {
	t.Helper()
	if out, err := n.command("rm", "--all", "-f").CombinedOutput(); err != nil {
		t.Errorf("atoll rm --all -f: %v\n%s", err, out)
	}
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-n.exited:
	case <-time.After(shutDown):
		t.Errorf("atoll up did not end within %v of SIGTERM", shutDown)
		_ = n.cmd.Process.Kill()
		<-n.exited
	}
	for _, left := range n.left() {
		t.Errorf("left behind: %s", left)
	}
	if t.Failed() {
		t.Logf("the node complained:\n%s", n.complaints())
	}
}

// left returns the processes and mounts that belong to the node's directory.
func (n *node) left() []string {
	var found []string
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range cmdlines {
		// A process that ends meanwhile cannot be read, and is not left.
		if text, err := os.ReadFile(file); err == nil && bytes.Contains(text, []byte(n.home)) {
			found = append(found, "process "+strings.ReplaceAll(string(text), "\x00", " "))
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " "+n.home) {
			found = append(found, "mount "+line)
		}
	}
	return found
}

// complaints returns what the node printed besides the ordinary course of things.
func (n *node) complaints() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var b strings.Builder
	for line := range strings.Lines(n.log.String()) {
		if !strings.Contains(line, "level=INFO") {
			b.WriteString(line)
		}
	}
	return tail(b.String())
}

// tail returns the end of what the node printed.
func (n *node) tail() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return tail(n.log.String())
}

// tail returns the last 16 kB of a text.
func tail(text string) string {
	const most = 16 << 10
	if len(text) <= most {
		return text
	}
	return "...\n" + text[len(text)-most:]
}

// command is `atoll ARGS` for this node.
func (n *node) command(args ...string) *exec.Cmd {
	cmd := exec.Command(shared.bin, args...)
	cmd.Env = n.env
	return cmd
}
