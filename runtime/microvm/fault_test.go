package microvm_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/sandbox"
)

// snapshotSteps and restoreSteps are where the processes that take part die.
var (
	snapshotSteps = []string{
		"layer made", "layer on record", "layer opened", "paused", "layer added", "devices saved", "memory written", "resumed",
		"files linked", "snapshot written",
	}
	restoreSteps = []string{"restore prepared", "monitor started", "machine runs"}
)

// ownerEnv makes the test binary a process that opens the runtime in the
// directory that it names, does one thing and dies at one of its steps.
const ownerEnv = "ATOLL_TEST_MICROVM_OWNER"

// owner is the program of that process. Its job is "COMMAND:STATE:STEP".
func owner(dir string) error {
	job := strings.SplitN(os.Getenv(ownerEnv+"_JOB"), ":", 3)
	r, err := microvm.New(context.Background(), microvm.Config{
		Dir: dir, Cache: os.Getenv(ownerEnv + "_CACHE"), Guest: os.Getenv(ownerEnv + "_GUEST"), Accelerator: "tcg",
		Defaults: sandbox.Resources{Memory: 160 << 20, Disk: 256 << 20},
	})
	if err != nil {
		return err
	}
	r.OnStep(func(step string) {
		if step == job[2] {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
	})
	fork := sandbox.Spec{
		ID: "fork", Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: os.Getenv(ownerEnv + "_ROOT"), Digest: "blake3:test"}, Network: sandbox.NetworkNone,
	}
	switch job[0] {
	case "snapshot":
		err = r.Snapshot(context.Background(), "first", job[1], sandbox.SnapshotOptions{})
	case "move":
		err = moveTo(r, fork, job[1], job[2] == stepMiddle)
	default:
		err = r.Restore(context.Background(), fork, job[1])
	}
	return errors.Join(errors.New("it lived through its step"), err)
}

// stepMiddle is in the middle of a machine's stream.
const stepMiddle = "middle of the stream"

// moveTo sends the first sandbox to another one of the same runtime, or dies in the middle.
func moveTo(r *microvm.Runtime, to sandbox.Spec, dir string, die bool) error {
	in, out := io.Pipe()
	sent, received := make(chan error, 1), make(chan error, 1)
	go func() {
		received <- r.Receive(context.Background(), to, dir, in, func(run func() error) error {
			if err := <-sent; err != nil {
				return err
			}
			return run()
		})
	}()
	var w io.Writer = out
	if die {
		w = &deadly{out, 8 << 10}
	}
	_, err := r.Send(context.Background(), "first", dir, w)
	_ = out.CloseWithError(err)
	sent <- err
	return errors.Join(err, <-received)
}

// deadly ends this process when so many bytes have passed.
type deadly struct {
	w    io.Writer
	left int
}

func (d *deadly) Write(p []byte) (int, error) {
	if d.left -= len(p); d.left < 0 {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	return d.w.Write(p)
}

// conformance: V3
func TestTheOwnersDeathAtAnyStepOfAMoveLeavesOneMachine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, s := open(t, dir), spec(t, "first")
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, "echo 0 > /dev/shm/n; (while :; do n=$(cat /dev/shm/n); echo $((n+1)) > /dev/shm/m; mv /dev/shm/m /dev/shm/n; done) > /dev/null 2>&1 &")
	for i, c := range []struct {
		step string
		want sandbox.State
	}{
		{"monitor waits for a machine", sandbox.Running}, {stepMiddle, sandbox.Running}, {"machine sent", sandbox.Running},
		{"machine on record as sent", sandbox.Paused}, {"machine runs", sandbox.Paused},
	} {
		state, ahead := t.TempDir(), i%2 == 0
		if err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{Ahead: ahead}); err != nil {
			t.Fatal(err)
		}
		if err := r.Restore(t.Context(), spec(t, "other"), state); ahead != sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("a snapshot without what has changed, %v, is restored: %v", ahead, err)
		}
		if err := r.Destroy(t.Context(), "other"); err != nil {
			t.Fatal(err)
		}
		r.Abandon()
		dieAt(t, dir, "move", state, c.step)
		r = open(t, dir)
		all, err := r.List(t.Context())
		if err != nil || len(all) != 1 || all[0].ID != s.ID || all[0].State != c.want {
			t.Fatalf("after the owner died at %q: %+v, %v", c.step, all, err)
		}
		if err := r.Resume(t.Context(), s.ID); err != nil {
			t.Fatalf("at %q: %v", c.step, err)
		}
		if got := sh(t, r, s.ID, "n=$(cat /dev/shm/n); while [ $(cat /dev/shm/n) = $n ]; do :; done; echo goes on"); got != "goes on\n" {
			t.Errorf("at %q: %q", c.step, got)
		}
	}
	destroyAll(t, r)
	if left := traces(t, dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// dieAt runs an owner of dir that dies at a step.
func dieAt(t *testing.T, dir, job, state, step string) {
	t.Helper()
	common, err := cache()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), ownerEnv+"="+dir, ownerEnv+"_JOB="+job+":"+state+":"+step, ownerEnv+"_CACHE="+common,
		ownerEnv+"_GUEST="+guesttest.Binary(t), ownerEnv+"_ROOT="+microvmtest.Root(t))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(interface{ Signal() unix.Signal }).Signal() != unix.SIGKILL {
		t.Fatalf("at %q: %v\n%s", step, err, out)
	}
}

// conformance: FR5.1 NFR3.3
func TestTheOwnersDeathAtAnyStepOfASnapshotLosesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, s := open(t, dir), spec(t, "first")
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, "echo begin > /mark")
	r.Abandon()
	for i, step := range snapshotSteps {
		state := t.TempDir()
		dieAt(t, dir, "snapshot", state, step)
		r = open(t, dir)
		if got := sh(t, r, s.ID, fmt.Sprintf("echo %d >> /mark; cat /mark | wc -l", i)); got != fmt.Sprintf("%d\n", i+2) {
			t.Errorf("after the owner died at %q the sandbox has %q lines", step, got)
		}
		whole := i == len(snapshotSteps)-1
		_, err := os.Stat(filepath.Join(state, "microvm.json"))
		if whole != (err == nil) {
			t.Errorf("at %q: is there a manifest? %v", step, err)
		}
		fork := s
		fork.ID = "fork"
		err = r.Restore(t.Context(), fork, state)
		switch {
		case whole && err != nil, !whole && !sandbox.Is(err, sandbox.Invalid):
			t.Errorf("restoring what was written up to %q: %v", step, err)
		case whole:
			if got := sh(t, r, "fork", "cat /mark | wc -l"); got != fmt.Sprintf("%d\n", i+1) {
				t.Errorf("the fork has %q lines", got)
			}
			if err := r.Destroy(t.Context(), "fork"); err != nil {
				t.Error(err)
			}
		}
		r.Abandon()
	}
	r = open(t, dir)
	destroyAll(t, r)
	if left := traces(t, dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// conformance: FR5.3 NFR3.3
func TestTheOwnersDeathAtAnyStepOfAForkLeavesNothingOfIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, s := open(t, dir), spec(t, "first")
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{Stop: true}); err != nil {
		t.Fatal(err)
	}
	before := traces(t, dir)
	r.Abandon()
	for _, step := range restoreSteps {
		dieAt(t, dir, "restore", state, step)
		r = open(t, dir)
		if left := traces(t, dir); len(left) != len(before) {
			t.Errorf("after the owner died at %q: %v", step, left)
		}
		r.Abandon()
	}
	r = open(t, dir)
	defer destroyAll(t, r)
	fork := s
	fork.ID = "fork"
	if err := r.Restore(t.Context(), fork, state); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, r, "fork", "echo alive"); got != "alive\n" {
		t.Errorf("the fork says %q", got)
	}
}

// conformance: FR5.1 NFR3.3
func TestTheMonitorsDeathAtAnyStepOfASnapshotIsTold(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir())
	defer destroyAll(t, r)
	for i, step := range snapshotSteps[:8] {
		s := spec(t, fmt.Sprintf("victim%d", i))
		if err := r.Create(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		r.OnStep(func(now string) {
			if now == step {
				kill(t, r, s.ID)
			}
		})
		state := t.TempDir()
		err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{})
		r.OnStep(func(string) {})
		if err == nil { // it died when all had been read
			fork := s
			fork.ID = "fork"
			if err := r.Restore(t.Context(), fork, state); err != nil {
				t.Errorf("at %q: %v", step, err)
			}
			_ = r.Destroy(t.Context(), "fork")
		} else if left, _ := os.ReadDir(state); len(left) > 0 || sandbox.KindOf(err) == "" {
			t.Errorf("at %q: %v, and %d files are left", step, err, len(left))
		}
		awaitError(t, r, s.ID)
		if err := r.Destroy(t.Context(), s.ID); err != nil {
			t.Errorf("at %q: %v", step, err)
		}
	}
}

// awaitError waits until a sandbox is on record as lost, and returns why.
func awaitError(t *testing.T, r *microvm.Runtime, id string) string {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		all, err := r.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range all {
			if st.ID == id && st.State == sandbox.Error {
				return st.Reason
			}
		}
	}
	t.Fatalf("%s is not lost", id)
	return ""
}

// conformance: NFR3.3 FR2.6
func TestTheEndOfAGuestIsToldWithItsReason(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ script, want string }{
		"its agent dies":     {"kill -QUIT 1", "Attempted to kill init"},
		"its kernel crashes": {"echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger", "panicked"},
	} {
		t.Run(name, func(t *testing.T) {
			r, s := start(t)
			events := r.Watch(t.Context())
			_, _ = run(t.Context(), r, s.ID, c.script) // no answer is expected
			if reason := awaitError(t, r, s.ID); !strings.Contains(reason, c.want) {
				t.Errorf("the reason is %q, want %q in it", reason, c.want)
			}
			for e := range events {
				if e.State == sandbox.Error {
					if !strings.Contains(e.Reason, c.want) {
						t.Errorf("the event says %q", e.Reason)
					}
					break
				}
			}
			if err := r.Destroy(t.Context(), s.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

// conformance: FR5.1
func TestASnapshotOntoAFullDiskFailsAndTheMachineGoesOn(t *testing.T) {
	t.Parallel()
	r, s := start(t)
	sh(t, r, s.ID, "echo kept > /mark; head -c 8000000 /dev/urandom > /dev/shm/noise")
	full := t.TempDir()
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	defer func() { _ = unix.Unmount(full, unix.MNT_DETACH) }()
	err := r.Snapshot(t.Context(), s.ID, full, sandbox.SnapshotOptions{Stop: true})
	if !sandbox.Is(err, sandbox.Exhausted) {
		t.Errorf("a snapshot onto a full disk: %v", err)
	}
	if left, _ := os.ReadDir(full); len(left) > 0 {
		t.Errorf("%d files are left of it", len(left))
	}
	if got := sh(t, r, s.ID, "cat /mark"); got != "kept\n" {
		t.Errorf("the sandbox says %q", got)
	}
}

// conformance: FR2.5
func TestOvercommitIsBoundedAndSaidInFigures(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), func(c *microvm.Config) { c.Overcommit = 1e-4 })
	defer destroyAll(t, r)
	err := r.Create(t.Context(), spec(t, "one"))
	if !sandbox.Is(err, sandbox.Exhausted) || !strings.Contains(err.Error(), "160 MiB wanted") {
		t.Errorf("Create: %v", err)
	}
}

func TestThePoolGivesMachinesOfEachStage(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), func(c *microvm.Config) { c.Prewarm = 2 })
	defer destroyAll(t, r)
	first := spec(t, "first")
	if err := r.Create(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	for i, how := range []string{microvm.StartCold, microvm.StartTemplate, microvm.StartSpawned, microvm.StartPool, microvm.StartPool} {
		s := spec(t, fmt.Sprintf("%s%d", how, i))
		s.Labels = map[string]string{microvm.LabelStart: how}
		err := r.Create(t.Context(), s)
		for end := time.Now().Add(time.Minute); sandbox.Is(err, sandbox.Unavailable) && time.Now().Before(end); err = r.Create(t.Context(), s) {
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if got := sh(t, r, s.ID, "uname -n; echo x > /mine"); got != s.ID+"\n" {
			t.Errorf("a machine that began %s says %q", how, got)
		}
		dir := t.TempDir()
		if err := r.Snapshot(t.Context(), s.ID, dir, sandbox.SnapshotOptions{Stop: true}); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if err := r.Restore(t.Context(), s, dir); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if got := sh(t, r, s.ID, "cat /mine"); got != "x\n" {
			t.Errorf("the fork of a machine that began %s says %q", how, got)
		}
		if err := r.Destroy(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
	}
}
