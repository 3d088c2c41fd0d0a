// Package guesttest gives tests the guest agent: its binary, and the agent
// itself running as a child process.
package guesttest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
)

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "atoll-guest-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "atoll-guest")
	_, self, _, _ := runtime.Caller(0)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./cmd/atoll-guest")
	cmd.Dir = filepath.Dir(filepath.Dir(filepath.Dir(self)))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", &buildError{out, err}
	}
	return path, nil
})

type buildError struct {
	output []byte
	err    error
}

func (e *buildError) Error() string {
	return "build atoll-guest: " + e.err.Error() + "\n" + string(e.output)
}

// Binary returns the path of the agent's binary, built on the first call. The
// environment variable ATOLL_GUEST names one to use instead. Main removes it.
func Binary(tb testing.TB) string {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

var built bool // by Binary; read by Main after all tests

func binary() (string, error) {
	if path := os.Getenv("ATOLL_GUEST"); path != "" {
		return path, nil
	}
	built = true
	return build()
}

// Main runs the tests of a package, for its TestMain, and removes the binary.
func Main(m *testing.M) int {
	code := m.Run()
	if built {
		if path, err := build(); err == nil {
			os.RemoveAll(filepath.Dir(path))
		}
	}
	return code
}

// Agent is a running agent.
type Agent struct {
	*guest.Client
	PID    int
	Socket string // path of the unix socket on which it listens
	log    bytes.Buffer
}

// Dial opens a connection to the agent.
func (a *Agent) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", a.Socket)
}

// Start starts an agent on a unix socket, with extra flags, and waits until it
// answers. It ends, with all its processes, at the end of the test.
func Start(tb testing.TB, flags ...string) *Agent {
	tb.Helper()
	// Not TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "guest-")
	if err != nil {
		tb.Fatal(err)
	}
	a := &Agent{Socket: filepath.Join(dir, "s")}
	cmd := exec.Command(Binary(tb), append([]string{"-listen", "unix:" + a.Socket}, flags...)...)
	cmd.Stderr = &a.log
	// A test that is killed must not leave its agent behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	locked := make(chan error)
	ended := make(chan struct{})
	go func() {
		// The death signal is that of the thread that started the process.
		runtime.LockOSThread()
		locked <- cmd.Start()
		if cmd.Process != nil {
			_ = cmd.Wait()
		}
		close(ended)
	}()
	if err := <-locked; err != nil {
		tb.Fatal(err)
	}
	a.PID = cmd.Process.Pid
	a.Client = guest.New(a.Dial, guest.Options{})
	tb.Cleanup(func() {
		a.CloseIdle()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		if tb.Failed() && a.log.Len() > 0 {
			tb.Logf("agent: %s", a.log.String())
		}
		os.RemoveAll(dir)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := a.WaitHealthy(ctx); err != nil {
		tb.Fatalf("the agent does not answer: %v", err)
	}
	return a
}
