package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

func sh(script string) guest.Command { return guest.Command{Args: []string{"sh", "-c", script}} }

// run runs a script that must succeed and returns its stdout.
func run(t *testing.T, c *guest.Client, script string) string {
	t.Helper()
	out, err := c.Run(t.Context(), sh(script))
	if err != nil {
		t.Fatal(err)
	}
	if out.ExitCode != 0 {
		t.Fatalf("%q: %s: %s", script, out.Message, out.Stderr)
	}
	return string(out.Stdout)
}

func start(t *testing.T, c *guest.Client, cmd guest.Command) *guest.Process {
	t.Helper()
	p, err := c.Start(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// readUntil collects output until it holds want.
func readUntil(t *testing.T, p *guest.Process, want string) string {
	t.Helper()
	var got strings.Builder
	for !strings.Contains(got.String(), want) {
		e, err := p.Next()
		if err != nil {
			t.Fatalf("%v; output so far %q", err, got.String())
		}
		if e.Kind == guest.End {
			t.Fatalf("ended with %+v before %q; output %q", e.Result, want, got.String())
		}
		got.Write(e.Data)
	}
	return got.String()
}

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Fatalf("error %v is %q, want %q", err, sandbox.KindOf(err), kind)
	}
}

// eventually waits for a state that the kernel reaches in its own time.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 2000 {
		if is() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

// conformance: SPEC2
func TestRunReturnsOutputAndExitCode(t *testing.T) {
	a := guesttest.Start(t)
	out, err := a.Run(t.Context(), sh("echo out; echo err >&2; exit 7"))
	if err != nil {
		t.Fatal(err)
	}
	if string(out.Stdout) != "out\n" || string(out.Stderr) != "err\n" || out.ExitCode != 7 || out.Signal != 0 {
		t.Fatalf("got %+v", out)
	}
	if out.Status != "exit status 7" || out.Message != "exit status 7" || out.ShellCode() != 7 {
		t.Fatalf("got %+v", out.Result)
	}
}

func TestASignalledProcessReportsItsSignal(t *testing.T) {
	a := guesttest.Start(t)
	out, err := a.Run(t.Context(), sh("kill -TERM $$"))
	if err != nil {
		t.Fatal(err)
	}
	if out.ExitCode != -1 || out.Signal != syscall.SIGTERM || out.ShellCode() != 143 || out.Message != "signal: terminated" {
		t.Fatalf("got %+v", out.Result)
	}
	// Memory is blamed only where it was the cause.
	if out, err = a.Run(t.Context(), sh("kill -KILL $$")); err != nil || out.ShellCode() != 137 || out.Message != "signal: killed" {
		t.Fatalf("got %+v, %v", out.Result, err)
	}
}

func TestStartRefusesWhatCannotRun(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/plain", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/garbage", []byte{1, 2, 3, 4}, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cmd  guest.Command
		kind sandbox.Kind
		says string
	}{
		{guest.Command{Args: []string{"no-such-command"}}, sandbox.NotFound, "command not found: no-such-command"},
		{guest.Command{Args: []string{"/no/such/file"}}, sandbox.NotFound, "/no/such/file"},
		{guest.Command{Args: []string{dir + "/plain"}}, sandbox.Denied, "cannot be executed"},
		{guest.Command{Args: []string{dir + "/garbage"}}, sandbox.Invalid, "exec format error"},
		{guest.Command{Args: []string{"true"}, Dir: "/no/such/dir"}, sandbox.Invalid, "cwd '/no/such/dir' does not exist"},
		{guest.Command{Args: []string{""}}, sandbox.Invalid, "no command"},
		{guest.Command{Args: []string{"true", "a\x00b"}}, sandbox.Invalid, "NUL"},
		{guest.Command{}, sandbox.Invalid, "no command"},
	} {
		_, err := a.Start(t.Context(), tc.cmd)
		wantKind(t, err, tc.kind)
		if !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: %v does not say %q", tc.cmd.Args, err, tc.says)
		}
	}
}

func TestTheEnvironmentIsMerged(t *testing.T) {
	a := guesttest.Start(t)
	if err := a.Init(t.Context(), wire.Init{EnvVars: map[string]string{"A": "init", "B": "init"}}); err != nil {
		t.Fatal(err)
	}
	cmd := sh(`echo "$A $B $C"; test -n "$HOME$USER$SHELL$LOGNAME$PATH"`)
	cmd.Env = map[string]string{"B": "call", "C": "call"}
	out, err := a.Run(t.Context(), cmd)
	if err != nil || string(out.Stdout) != "init call call\n" || out.ExitCode != 0 {
		t.Fatalf("got %q %v", out.Stdout, err)
	}
	envs, err := a.Envs(t.Context())
	if err != nil || len(envs) != 2 || envs["A"] != "init" {
		t.Fatalf("got %v %v", envs, err)
	}
}

func TestArgumentsMayHoldAnyBytes(t *testing.T) {
	a := guesttest.Start(t)
	cmd := guest.Command{Args: []string{"sh", "-c", `printf %s "$1$V"`, "x", "\xff\n\U0010FE41é"}, Env: map[string]string{"V": "\xfe"}}
	out, err := a.Run(t.Context(), cmd)
	if err != nil || string(out.Stdout) != "\xff\n\U0010FE41é\xfe" {
		t.Fatalf("got %q %v", out.Stdout, err)
	}
	start(t, a.Client, guest.Command{Args: []string{"sleep", "1000", "0"}, Env: cmd.Env})
	if running, err := a.List(t.Context()); err != nil || len(running) != 1 || running[0].Env["V"] != "\xfe" {
		t.Errorf("got %+v %v", running, err)
	}
}

func TestCommandsAreFoundInTheProcessesOwnPath(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/mine", []byte("#!/bin/sh\npwd\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []guest.Command{
		{Args: []string{"mine"}, Env: map[string]string{"PATH": dir + ":/bin"}, Dir: dir},
		{Args: []string{"./mine"}, Dir: dir},
		{Args: []string{"mine"}, Env: map[string]string{"PATH": ".:/bin"}, Dir: dir},
	} {
		out, err := a.Run(t.Context(), cmd)
		if err != nil || strings.TrimSpace(string(out.Stdout)) != dir {
			t.Errorf("%+v: got %q %v", cmd, out.Stdout, err)
		}
	}
}

// conformance: SPEC2
func TestStdinIsWrittenAndClosed(t *testing.T) {
	a := guesttest.Start(t)
	cmd := sh("read line; echo got $line; cat")
	cmd.Stdin = true
	p := start(t, a.Client, cmd)
	ctx := t.Context()
	if err := p.Write(ctx, []byte("one\n"), false); err != nil {
		t.Fatal(err)
	}
	readUntil(t, p, "got one\n")
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB, more than any pipe holds
	sent := make(chan error, 1)
	go func() {
		if err := p.Write(ctx, big, false); err != nil {
			sent <- err
			return
		}
		sent <- p.CloseStdin(ctx)
	}()
	var rest bytes.Buffer
	result, err := p.Wait(&rest, nil)
	if err != nil || result.ExitCode != 0 || !bytes.Equal(rest.Bytes(), big) {
		t.Fatalf("got %d bytes, %+v, %v", rest.Len(), result, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	wantKind(t, p.Write(ctx, []byte("x"), false), sandbox.NotFound) // it ended
}

func TestInputThatSuitsNotIsRefused(t *testing.T) {
	a := guesttest.Start(t)
	p := start(t, a.Client, sh("sleep 100"))
	wantKind(t, p.Write(t.Context(), []byte("x"), false), sandbox.Conflict) // no stdin
	wantKind(t, p.Write(t.Context(), []byte("x"), true), sandbox.Conflict)  // no terminal
	wantKind(t, p.Resize(t.Context(), guest.Size{Cols: 1, Rows: 1}), sandbox.Conflict)
	if err := p.CloseStdin(t.Context()); err != nil {
		t.Fatal("closing what is not open is no error:", err)
	}
}

func TestAWriteToAProcessThatDoesNotReadEndsWithTheCaller(t *testing.T) {
	a := guesttest.Start(t)
	cmd := sh("exec sleep 100")
	cmd.Stdin = true
	p := start(t, a.Client, cmd)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := p.Write(ctx, make([]byte, 1<<20), false)
	if !sandbox.Is(err, sandbox.Timeout) && !sandbox.Is(err, sandbox.Canceled) {
		t.Fatalf("got %v", err)
	}
	// The process still takes signals, and a writer that waits is released by its end.
	waiting := make(chan error, 1)
	go func() { waiting <- p.Write(t.Context(), make([]byte, 1<<20), false) }()
	if err := p.Signal(t.Context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err == nil {
		t.Fatal("a write to a dead process succeeded")
	}
}

// conformance: SPEC2
func TestATerminalIsInteractive(t *testing.T) {
	a := guesttest.Start(t)
	p := start(t, a.Client, guest.Command{
		Args: []string{"bash", "--norc", "--noprofile", "-i"}, PTY: &guest.Size{Cols: 99, Rows: 33},
		Env: map[string]string{"PS1": "ready> ", "TERM": "xterm"},
	})
	ctx := t.Context()
	readUntil(t, p, "ready> ")
	send := func(text string) {
		t.Helper()
		if err := p.Write(ctx, []byte(text), true); err != nil {
			t.Fatal(err)
		}
	}
	send("stty size\n")
	readUntil(t, p, "33 99\r\n")
	if err := p.Resize(ctx, guest.Size{Cols: 120, Rows: 40}); err != nil {
		t.Fatal(err)
	}
	send("stty size\n")
	readUntil(t, p, "40 120\r\n")
	send("tty\n")
	readUntil(t, p, "/dev/pts/")
	send("sh -c 'echo in-$((1+1)); exec sleep 1000'\n")
	readUntil(t, p, "in-2")
	send("\x03") // Ctrl-C reaches the foreground job
	send("echo again-$((1+1))\n")
	readUntil(t, p, "again-2")
	wantKind(t, p.Write(ctx, []byte("x"), false), sandbox.Conflict)
	wantKind(t, p.CloseStdin(ctx), sandbox.Conflict)
	send("exit 3\n")
	result, err := p.Wait(io.Discard, nil)
	if err != nil || result.ExitCode != 3 {
		t.Fatalf("got %+v %v", result, err)
	}
}

func TestKillingAProcessKillsItsGroupAndItsJobs(t *testing.T) {
	a := guesttest.Start(t)
	plain := start(t, a.Client, sh("sleep 1000 & echo child $!; wait"))
	var child int
	if _, err := fmt.Sscanf(readUntil(t, plain, "\n"), "child %d", &child); err != nil {
		t.Fatal(err)
	}
	// A job of an interactive shell has a group of its own.
	shell := start(t, a.Client, guest.Command{Args: []string{"bash", "--norc", "--noprofile", "-i"}, PTY: &guest.Size{}})
	if err := shell.Write(t.Context(), []byte("sleep 1000 &\necho job=$!_\"\"end\n"), true); err != nil {
		t.Fatal(err)
	}
	text := readUntil(t, shell, "_end\r\n")
	var job int
	if _, err := fmt.Sscanf(text[strings.LastIndex(text, "job=")+4:], "%d", &job); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	for _, p := range []*guest.Process{plain, shell} {
		if err := p.Signal(t.Context(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Whoever is told of the kill finds the process gone.
		wantKind(t, a.Signal(t.Context(), p.PID, syscall.SIGKILL), sandbox.NotFound)
		result, err := p.Wait(nil, nil)
		if err != nil || result.Signal != syscall.SIGKILL || result.Message != "signal: killed" {
			t.Fatalf("got %+v %v", result, err)
		}
	}
	eventually(t, "the children die", func() bool { return !alive(child) && !alive(job) })
}

func TestSeveralClientsWatchOneProcessAndMayLeave(t *testing.T) {
	a := guesttest.Start(t)
	cmd := sh("read go; echo one; read go; echo two")
	cmd.Stdin, cmd.Tag = true, "watched"
	first := start(t, a.Client, cmd)
	second, err := a.Connect(t.Context(), first.PID)
	if err != nil {
		t.Fatal(err)
	}
	third, err := a.ConnectTag(t.Context(), "watched")
	if err != nil || third.PID != first.PID {
		t.Fatal(third, err)
	}
	if err := second.Write(t.Context(), []byte("\n"), false); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*guest.Process{first, second, third} {
		readUntil(t, p, "one\n")
	}
	_ = first.Close()
	_ = second.Close()
	running, err := a.List(t.Context())
	if err != nil || len(running) != 1 || running[0].PID != third.PID || running[0].Tag != "watched" || running[0].Args[0] != "sh" {
		t.Fatalf("got %+v %v", running, err)
	}
	if err := third.Write(t.Context(), []byte("\n"), false); err != nil {
		t.Fatal(err)
	}
	var rest bytes.Buffer
	if result, err := third.Wait(&rest, nil); err != nil || result.ExitCode != 0 || rest.String() != "two\n" {
		t.Fatalf("got %q %+v %v", rest.String(), result, err)
	}
	if running, err := a.List(t.Context()); err != nil || len(running) != 0 {
		t.Fatalf("got %+v %v", running, err)
	}
	_, err = a.Connect(t.Context(), first.PID)
	wantKind(t, err, sandbox.NotFound)
	_, err = a.ConnectTag(t.Context(), "watched")
	wantKind(t, err, sandbox.NotFound)
}

// conformance: SPEC2
func TestAFloodWaitsForASlowClient(t *testing.T) {
	a := guesttest.Start(t)
	p := start(t, a.Client, sh("yes 0123456789abcdef | head -c 300000000; echo done >&2"))
	before := residentKiB(t, a.PID)
	readUntil(t, p, "0123456789abcdef") // and then not for a while
	time.Sleep(300 * time.Millisecond)
	stalled := residentKiB(t, a.PID)
	n := &counter{}
	var stderr bytes.Buffer
	if _, err := p.Wait(n, &stderr); err != nil {
		t.Fatal(err)
	}
	// What readUntil took is missing from the count: less than what one call can hold.
	if n.bytes < 299_000_000 || stderr.String() != "done\n" {
		t.Fatalf("got %d bytes and %q", n.bytes, stderr.String())
	}
	after := residentKiB(t, a.PID)
	t.Logf("measured: SPEC2 agent memory in KiB: before %d, stalled %d, after 300 MB of output %d", before, stalled, after)
	if after > before+48<<10 || stalled > before+48<<10 {
		t.Errorf("the agent grew from %d KiB to %d (stalled) and %d", before, stalled, after)
	}
}

type counter struct{ bytes int }

func (c *counter) Write(b []byte) (int, error) { c.bytes += len(b); return len(b), nil }

func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestAFloodWithoutAClientDoesNotStall(t *testing.T) {
	a := guesttest.Start(t)
	marker := t.TempDir() + "/done"
	p := start(t, a.Client, sh("yes | head -c 20000000; touch "+marker))
	_ = p.Close()
	eventually(t, "the process ends by itself", func() bool { _, err := os.Stat(marker); return err == nil })
}

func TestADeadlineKillsTheCommandEvenWithoutItsClient(t *testing.T) {
	a := guesttest.Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	p, err := a.Start(ctx, sh("sleep 1000"))
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Close()
	if !alive(p.PID) {
		t.Fatal("the process died with its client")
	}
	eventually(t, "the process is killed", func() bool { return !alive(p.PID) })
}

func TestACanceledRunTakesItsCommandAlong(t *testing.T) {
	a := guesttest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	pidFile := t.TempDir() + "/pid"
	done := make(chan error, 1)
	go func() {
		_, err := a.Run(ctx, sh("echo $$ > "+pidFile+".new && mv "+pidFile+".new "+pidFile+"; sleep 1000"))
		done <- err
	}()
	var pid int
	eventually(t, "the command runs", func() bool {
		text, err := os.ReadFile(pidFile)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		return err == nil
	})
	cancel()
	wantKind(t, <-done, sandbox.Canceled)
	eventually(t, "the command dies", func() bool { return !alive(pid) })
}

func TestABackgroundChildDoesNotHoldUpTheEnd(t *testing.T) {
	a := guesttest.Start(t)
	marker := t.TempDir() + "/survived"
	// The child holds stdout and writes to it long after the end was reported.
	out := run(t, a.Client, "(sleep 0.5; echo late; echo later; touch "+marker+") & echo early")
	if out != "early\n" {
		t.Fatalf("got %q", out)
	}
	eventually(t, "the child lives on although nobody reads its output", func() bool { _, err := os.Stat(marker); return err == nil })
}

func TestAllOutputBeforeTheEndArrives(t *testing.T) {
	a := guesttest.Start(t)
	for range 5 {
		// The sleeper keeps the pipe open, so the end cannot be told by its closing.
		out := run(t, a.Client, "sleep 1000 & head -c 60000 /dev/zero")
		if len(out) != 60000 {
			t.Fatalf("got %d bytes", len(out))
		}
	}
}

func TestOrphansAreReapedAndStatusesAreNotLost(t *testing.T) {
	a := guesttest.Start(t)
	for i := range 30 {
		// Each command leaves an orphan that ends at about the same time.
		out, err := a.Run(t.Context(), sh(fmt.Sprintf("(sleep 0.0%d &) ; exit %d", i%10, i)))
		if err != nil || out.ExitCode != i {
			t.Fatalf("got %+v %v, want exit code %d", out.Result, err, i)
		}
	}
	eventually(t, "no child is left", func() bool {
		kids, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", a.PID, a.PID))
		return err == nil && len(bytes.TrimSpace(kids)) == 0
	})
}

func TestCommandsRunAsTheUserThatIsAskedFor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become other users")
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip("needs a user nobody")
	}
	a := guesttest.Start(t)
	as := func(name string) string {
		t.Helper()
		return run(t, a.With(guest.Options{User: name}), `echo "$(id -u):$(id -g):$HOME:$USER"`)
	}
	want := nobody.Uid + ":" + nobody.Gid + ":" + nobody.HomeDir + ":nobody\n"
	if got := as("nobody"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := as(nobody.Uid); got != want {
		t.Errorf("by number: got %q, want %q", got, want)
	}
	if got := as("12345:54321"); got != "12345:54321:/:12345\n" {
		t.Errorf("unknown numbers: got %q", got)
	}
	if got := as("root"); !strings.HasPrefix(got, "0:0:/root:root") {
		t.Errorf("got %q", got)
	}
	_, err = a.With(guest.Options{User: "no-such-user"}).Run(t.Context(), sh("true"))
	wantKind(t, err, sandbox.Denied)

	name := "nobody"
	if err := a.Init(t.Context(), wire.Init{DefaultUser: &name}); err != nil {
		t.Fatal(err)
	}
	if got := as(""); got != want {
		t.Errorf("default user: got %q, want %q", got, want)
	}
	name = "no-such-user"
	if err := a.Init(t.Context(), wire.Init{DefaultUser: &name}); err != nil {
		t.Fatal(err)
	}
	if got := as(""); got == "" {
		t.Error("a default user that the image lacks must fall back")
	}
	dir := t.TempDir()
	if err := a.Init(t.Context(), wire.Init{DefaultWorkdir: &dir}); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(run(t, a.Client, "pwd")); got != dir {
		t.Errorf("default working directory: got %q", got)
	}
}

func TestTheAgentIsTheLastToDieForWantOfMemory(t *testing.T) {
	a := guesttest.Start(t)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	var agent, child, grandchild int
	fmt.Sscan(string(text), &agent)
	fmt.Sscan(run(t, a.Client, "cat /proc/self/oom_score_adj; sh -c 'cat /proc/self/oom_score_adj'"), &child, &grandchild)
	if agent >= child || child != grandchild {
		t.Fatalf("the agent's score is %d, its child's %d, its grandchild's %d", agent, child, grandchild)
	}
}

func TestOneAgentRunsManyCommandsAtOnce(t *testing.T) {
	a := guesttest.Start(t)
	const n = 50
	errs := make(chan error, n)
	for i := range n {
		go func() {
			out, err := a.Run(t.Context(), sh(fmt.Sprintf("echo %d", i)))
			if err == nil && string(out.Stdout) != fmt.Sprintln(i) {
				err = errors.New("wrong output " + string(out.Stdout))
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
