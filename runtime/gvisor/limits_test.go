package gvisor_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/sandbox"
)

// agent is a client of a sandbox's guest. Without /etc/passwd its user is root.
func agent(r sandbox.Runtime, id string) *guest.Client {
	return guest.New(func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, id, sandbox.GuestPort) }, guest.Options{})
}

// start opens a runtime that ends with the test and makes a sandbox in it.
func start(t *testing.T, edit func(*sandbox.Spec)) (*gvisor.Runtime, sandbox.Spec) {
	t.Helper()
	r := open(t, t.TempDir())
	t.Cleanup(func() {
		all, _ := r.List(context.Background())
		for _, st := range all {
			if err := r.Destroy(context.Background(), st.ID); err != nil {
				t.Error(err)
			}
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	spec := erofsSpec(t, "a1")
	if edit != nil {
		edit(&spec)
	}
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	return r, spec
}

func TestASandboxHasNoDescriptorsButThoseItIsGiven(t *testing.T) {
	for fd := 250; fd < 260; fd++ { // among them those that gVisor's kernel wants for itself
		if err := unix.Dup3(2, fd, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
	}
	r, spec := start(t, nil)
	sh(t, r, spec.ID, "true")
}

// conformance: FR2.5
func TestRootInsideCannotForkBeyondTheLimit(t *testing.T) {
	const limit = 100
	r, spec := start(t, func(s *sandbox.Spec) { s.Resources.Pids = limit })
	sh(t, r, spec.ID, "sh -c 'i=0; while [ $i -lt 300 ]; do sleep 300 >/dev/null 2>&1 & i=$((i+1)); done' >/dev/null 2>&1; true")
	st, err := r.Stats(t.Context(), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if st.Pids > limit+20 || st.Pids < limit/2 {
		t.Errorf("%d processes and threads under a limit of %d", st.Pids, limit)
	}
}

// conformance: FR2.5 NFR4.2
func TestASandboxWithoutMemorySaysSo(t *testing.T) {
	r, spec := start(t, func(s *sandbox.Spec) { s.Resources.Memory = 96 << 20 })
	events := r.Watch(t.Context())
	_, _ = agent(r, spec.ID).Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", "head -c 1000000000 /dev/zero | tail -n 1 >/dev/null"}})
	for e := range events {
		if e.Kind == sandbox.EventResource {
			if !strings.Contains(e.Reason, "memory") {
				t.Errorf("the reason is %q", e.Reason)
			}
			return
		}
	}
}

// conformance: FR5.1
func TestASnapshotOntoAFullDiskLeavesTheSandboxRunningAndTheDirectoryEmpty(t *testing.T) {
	r, spec := start(t, nil)
	sh(t, r, spec.ID, "head -c 30000000 /dev/urandom > /big")
	disk := t.TempDir()
	if err := unix.Mount("small", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	err := r.Snapshot(t.Context(), spec.ID, disk, sandbox.SnapshotOptions{Stop: true})
	if !sandbox.Is(err, sandbox.Exhausted) {
		t.Errorf("Snapshot: %v, want exhausted", err)
	}
	if left, _ := os.ReadDir(disk); len(left) > 0 {
		t.Errorf("left in the directory: %v", left)
	}
	if got := sh(t, r, spec.ID, "wc -c < /big"); strings.TrimSpace(got) != "30000000" {
		t.Errorf("afterwards the sandbox says %q", got)
	}
	if err := r.Snapshot(t.Context(), spec.ID, t.TempDir(), sandbox.SnapshotOptions{}); err != nil {
		t.Errorf("a later snapshot: %v", err)
	}
}

func TestASlowReaderGetsEveryByteAndAHalfCloseArrives(t *testing.T) {
	r, spec := start(t, nil)
	// The agent forwards to any port, so a request whose body it reads slowly does.
	sent := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
	client := agent(r, spec.ID)
	pr, pw := io.Pipe()
	go func() {
		for at := 0; at < len(sent); at += 100_000 { // sizes that fit no buffer
			if _, err := pw.Write(sent[at:min(at+100_000, len(sent))]); err != nil {
				return
			}
		}
		pw.Close()
	}()
	if err := client.WriteFile(t.Context(), "/up", pr); err != nil {
		t.Fatal(err)
	}
	back, err := client.ReadFile(t.Context(), "/up")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	time.Sleep(200 * time.Millisecond) // the guest's and our buffers fill up
	if got, err := io.ReadAll(back); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, %v; want the %d sent", len(got), err, len(sent))
	}

	conn, err := r.Dial(t.Context(), spec.ID, sandbox.GuestPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET /health HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.")) {
		t.Errorf("after our half was closed the guest answered %q, %v", answer, err)
	}
}

// conformance: FR5.1 FR5.3
func TestOpenConnectionsSurviveASnapshotAndEndInTheFork(t *testing.T) {
	r, spec := start(t, nil)
	client := agent(r, spec.ID)
	p, err := client.Start(t.Context(), guest.Command{Args: []string{"/bin/cat"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	state := t.TempDir()
	for range 3 {
		state = t.TempDir()
		if err := r.Snapshot(t.Context(), spec.ID, state, sandbox.SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Write(t.Context(), []byte("still here"), false); err != nil {
		t.Fatal(err)
	}
	for got := ""; got != "still here"; {
		e, err := p.Next()
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got += string(e.Data)
	}
	spec.ID = "fork"
	if err := r.Restore(t.Context(), spec, state); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, r, "fork", "cat /proc/net/tcp | grep -c 0100407F:.*:....\\ 01 || true"); strings.TrimSpace(got) != "1" {
		// Only the connection of this very call is left.
		t.Logf("connections from outside in the fork: %s", got)
	}
}

func TestBootedSentriesServeCreateAndRestoreAndGoWithTheRuntime(t *testing.T) {
	dir := t.TempDir()
	before := traces(t, dir)
	r := open(t, dir, func(c *gvisor.Config) { c.Prewarm = 2 })
	warm := func() int {
		found, _ := filepath.Glob(filepath.Join(dir, "s", "warm-*", "control.sock"))
		return len(found)
	}
	state := t.TempDir()
	for i := range 6 {
		spec := erofsSpec(t, "w"+strconv.Itoa(i))
		spec.Hostname = "host" + strconv.Itoa(i)
		var err error
		if i < 3 {
			err = r.Create(t.Context(), spec)
		} else {
			err = r.Restore(t.Context(), spec, state)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := sh(t, r, spec.ID, "uname -n; cat /etc/hostname; echo "+spec.ID+" > /mine; cat /mine"); got != spec.Hostname+"\n"+spec.Hostname+"\n"+spec.ID+"\n" {
			t.Errorf("%s says %q", spec.ID, got)
		}
		if i == 2 {
			if err := r.Snapshot(t.Context(), spec.ID, state, sandbox.SnapshotOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		for end := time.Now().Add(time.Minute); warm() < 2 && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		if n := warm(); n != 2 {
			t.Errorf("%d sentries wait, want 2", n)
		}
	}
	for i := range 6 {
		if err := r.Destroy(t.Context(), "w"+strconv.Itoa(i)); err != nil {
			t.Error(err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if after := traces(t, dir); len(after) > len(before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}
