package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func canLive(c sandbox.Capabilities) bool { return c.Live }

var liveTests = []test{
	{"a sandbox is sent while it runs, and goes on as it was", canLive, testSend},
	{"a sandbox that is not let run there goes on here", canLive, testSendRefused},
	{"a sandbox that was sent stands still, also for the next process", canLive, testSendStays},
	{"what does not arrive whole leaves the sandbox and nothing else", canLive, testSendCut},
	{"without the capability it is refused", func(c sandbox.Capabilities) bool { return !c.Live }, testSendUnsupported},
}

// send moves b to a new sandbox of the same runtime. start is as for Receive.
func (s *suite) send(t *testing.T, b *box, start func(run func() error) error) (arrived *box, sent, received error) {
	t.Helper()
	dir := b.snapshot(sandbox.SnapshotOptions{})
	spec := b.spec
	spec.ID = sandbox.NewID()
	arrived = s.box(t, spec)
	r, w := io.Pipe()
	done, returned := make(chan error, 1), make(chan struct{})
	go func() {
		done <- s.Runtime.Receive(deadline(t), spec, dir, r, func(run func() error) error {
			<-returned // as between nodes, where the sender says that it may run
			if sent != nil {
				return sent
			}
			return start(run)
		})
	}()
	stopped, sent := s.Runtime.Send(deadline(t), b.id, dir, w)
	close(returned)
	_ = w.CloseWithError(sent)
	if sent == nil && stopped.IsZero() {
		t.Error("it is not said when it was stopped")
	}
	return arrived, sent, <-done
}

func testSend(t *testing.T, s *suite) {
	b := s.create(t)
	b.must("mkdir deep; echo before > deep/file")
	var pid string
	if s.caps.Memory {
		pid = b.startCounter().ask(1)
	}
	arrived, sent, received := s.send(t, b, func(run func() error) error {
		if st, _ := s.status(t, b.id); st.State != sandbox.Paused { // not Fatal, which ends Receive but not the test
			return fmt.Errorf("it is %q when it may run elsewhere", st.State)
		}
		return run()
	})
	if err := errors.Join(sent, received); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, b.id, sandbox.Paused)
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, arrived.id, sandbox.Running)
	if got := arrived.must("cat deep/file"); got != "before\n" {
		t.Errorf("it has %q", got)
	}
	if s.caps.Memory {
		if again := (counter{arrived}).ask(2); again != pid {
			t.Errorf("process %s became %s", pid, again)
		}
	}
	arrived.snapshot(sandbox.SnapshotOptions{}) // it is as good as any
}

func testSendRefused(t *testing.T, s *suite) {
	b := s.create(t)
	no := errors.New("no")
	arrived, sent, received := s.send(t, b, func(func() error) error { return no })
	if sent != nil || !errors.Is(received, no) {
		t.Fatalf("sent: %v, received: %v", sent, received)
	}
	if err := s.Runtime.Resume(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	b.must("echo on > file; sync; cat file")
	s.wantGone(t, arrived.id)
}

func testSendStays(t *testing.T, s *suite) {
	b := s.create(t)
	if _, sent, received := s.send(t, b, func(func() error) error { return errors.New("no") }); sent != nil || received == nil {
		t.Fatalf("sent: %v, received: %v", sent, received)
	}
	if s.Reopen == nil || !s.caps.Persistent {
		return
	}
	s.Runtime = s.Reopen(t)
	s.wantState(t, b.id, sandbox.Paused)
	b.rt = s.Runtime
	if err := s.Runtime.Resume(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	b.must("echo on")
}

func testSendCut(t *testing.T, s *suite) {
	b := s.create(t)
	b.write("file", make([]byte, 64<<10))
	dir := b.snapshot(sandbox.SnapshotOptions{})
	spec := b.spec
	spec.ID = sandbox.NewID()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- s.Runtime.Receive(deadline(t), spec, dir, r, func(run func() error) error { return errors.New("it did not arrive") })
	}()
	ctx, cancel := context.WithCancel(deadline(t))
	if _, err := s.Runtime.Send(ctx, b.id, dir, &cutting{w, 3000, cancel}); err == nil {
		t.Error("what was cut off was sent")
	}
	cancel()
	_ = w.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-done; err == nil {
		t.Error("what was cut off has arrived")
	}
	s.wantState(t, b.id, sandbox.Running)
	b.must("echo on")
	s.wantGone(t, spec.ID)
}

// cutting fails once so many bytes have passed.
type cutting struct {
	w    io.Writer
	left int
	cut  func()
}

func (c *cutting) Write(p []byte) (int, error) {
	if c.left -= len(p); c.left < 0 {
		c.cut()
		return 0, io.ErrClosedPipe
	}
	return c.w.Write(p)
}

func testSendUnsupported(t *testing.T, s *suite) {
	b := s.create(t)
	if _, err := s.Runtime.Send(deadline(t), b.id, t.TempDir(), io.Discard); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("Send: %v", err)
	}
	spec := b.spec
	spec.ID = sandbox.NewID()
	r, w := io.Pipe()
	_ = w.Close()
	err := s.Runtime.Receive(deadline(t), spec, t.TempDir(), r, func(run func() error) error { return run() })
	if !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("Receive: %v", err)
	}
}
