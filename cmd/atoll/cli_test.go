package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

// conformance: FR1.4
func TestRunWithoutDaemonPassesOutputInputAndExitCodes(t *testing.T) {
	c := newCLI(t)
	if got := c.ok("run", "--rm", "host", "--", "echo", "hello"); got != "hello" {
		t.Errorf("got %q", got)
	}
	c.fails(7, "", "run", "host", "--", "sh", "-c", "exit 7")
	c.fails(127, "command not found", "run", "host", "--", "no-such-command")
	c.fails(126, "/etc/passwd", "run", "host", "--", "/etc/passwd")
	c.fails(137, "", "run", "host", "--", "sh", "-c", "kill -9 $$")
	c.fails(125, "unknown flag", "run", "--no-such-flag", "host")
	c.fails(125, "no such runtime", "run", "--runtime", "nosuch", "host", "--", "true")
	c.fails(125, "names no command", "run", "host")
	c.fails(1, "atoll up", "ls")
	c.fails(1, "did you mean", "creat", "host")

	data := bytes.Repeat([]byte("binary\x00\xff\r\n"), 300_000)
	if r := c.run(bytes.NewReader(data), "run", "-i", "host", "--", "cat"); r.out != string(data) {
		t.Errorf("%d of %d bytes came back: %s", len(r.out), len(data), r.errors)
	}
	if r := c.run(strings.NewReader("unread"), "run", "host", "--", "cat"); r.out != "" || r.code != 0 {
		t.Errorf("without -i: %+v", r)
	}
	left, err := os.ReadDir(filepath.Join(c.home, "run"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// conformance: FR1.4
func TestARunIsFollowedByTheNode(t *testing.T) {
	c := newNode(t)
	// Its client is killed: nobody else would remove it.
	cmd := c.command(t, "run", "--rm", "--name", "doomed", "host", "--", "sh", "-c", "echo begun; sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	(&reader{t: t, r: out}).until("begun")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	c.gone("doomed")

	c.ok("run", "-d", "--name", "job", "host", "--", "sh", "-c", "exit 3")
	if got := c.ok("wait", "job"); got != "3" {
		t.Errorf("wait: %q", got)
	}
	if got := c.ok("ls"); !strings.Contains(got, "exited 3") {
		t.Errorf("ls: %s", got)
	}
	if got := c.ok("inspect", "job"); !strings.Contains(got, `"exitCode": 3`) {
		t.Errorf("inspect: %s", got)
	}
	c.ok("run", "-d", "--rm", "--name", "passing", "host", "--", "true")
	c.gone("passing")
}

// gone waits until a sandbox is no more.
func (c *cli) gone(name string) {
	c.t.Helper()
	for range 600 {
		if c.run(nil, "inspect", name).code != 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.t.Fatalf("%s is still there: %s", name, c.ok("ls", "-a"))
}

func TestACommandWhoseSandboxStopsSaysWhy(t *testing.T) {
	c := newNode(t)
	for _, tc := range []struct {
		name string
		do   []string
		code int
		says string
	}{
		{"paused", []string{"pause", "box"}, 125, "was paused"},
		{"removed", []string{"rm", "-f", "box"}, 137, "was removed"},
	} {
		for _, how := range [][]string{{"exec", "box"}, {"run", "--name", "box", "host"}} {
			t.Run(tc.name+" under "+how[0], func(t *testing.T) {
				if how[0] == "exec" {
					c.ok("create", "host", "--name", "box")
				}
				cmd := c.command(t, append(how, "--", "sh", "-c", "echo begun; sleep 1000")...)
				var errs bytes.Buffer
				cmd.Stderr = &errs
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				(&reader{t: t, r: out}).until("begun")
				c.ok(tc.do...)
				if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != tc.code || !strings.Contains(errs.String(), tc.says) {
					t.Errorf("ended with %d: %s", cmd.ProcessState.ExitCode(), errs.String())
				}
				c.ok("rm", "-f", "box")
			})
		}
	}
	if r := c.run(nil, "run", "--rm", "--name", "greedy", "-m", "64m", "host", "--", "python3", "-c", "x = b'1' * (1 << 30)"); r.code == 0 || !strings.Contains(strings.ToLower(r.errors), "memory") {
		t.Errorf("out of memory: %+v", r)
	}
	c.fails(137, "", "run", "--rm", "host", "--", "sh", "-c", "kill -9 $$")
	if r := c.run(nil, "run", "--rm", "host", "--", "sh", "-c", "kill -9 $$"); strings.Contains(r.errors, "memory") {
		t.Errorf("memory is blamed: %s", r.errors)
	}
}

func TestNonsenseIsRefusedInTheUsersWords(t *testing.T) {
	c := newNode(t)
	for _, cpus := range []string{"nan", "inf", "-1"} {
		c.fails(125, "number of cores", "run", "--cpus", cpus, "host", "--", "true")
	}
	c.fails(125, "more than 0", "run", "-m", "0", "host", "--", "true")
	c.fails(125, "more than 0", "run", "-m", "-1g", "host", "--", "true")
	c.fails(125, "this host has", "run", "-m", "4000t", "host", "--", "true")
	c.fails(125, "/no/such: ", "run", "-w", "/no/such", "host", "--", "pwd")
	c.fails(1, "/no/such: ", "create", "-w", "/no/such", "host")
	c.fails(1, "worktree runs git repositories, not the image `host`", "create", "--runtime", "worktree", "host")
	if got := c.ok("ls", "-a", "-q"); strings.Contains(c.ok("ls", "-a"), "/no/such") {
		t.Errorf("left: %s", got)
	}
}

func TestRunSeparatesOutputsAndSetsEnvironmentUserAndDirectory(t *testing.T) {
	c := newCLI(t)
	r := c.run(nil, "run", "-e", "A=two words", "-w", "/tmp", "--hostname", "box", "host", "--", "sh", "-c", "echo $A; pwd; hostname; echo wrong >&2")
	if r.out != "two words\n/tmp\nbox\n" || r.errors != "wrong\n" {
		t.Errorf("%+v", r)
	}
}

func TestSignalsReachTheCommand(t *testing.T) {
	c := newCLI(t)
	cmd := c.command(t, "run", "host", "--", "sh", "-c", "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, line); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	_ = cmd.Wait()
	if string(rest) != "caught\n" || cmd.ProcessState.ExitCode() != 5 {
		t.Errorf("%q, %v", rest, cmd.ProcessState)
	}
}

func TestAReaderThatLeavesEndsTheCommand(t *testing.T) {
	c := newCLI(t)
	cmd := c.command(t, "run", "host", "--", "yes")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	out.Close()
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 141 {
		t.Errorf("ended with %v", cmd.ProcessState)
	}
	if left, _ := os.ReadDir(filepath.Join(c.home, "run")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestTerminalHasSizeKeysAndExitCode(t *testing.T) {
	c := newCLI(t)
	cmd := c.command(t, "run", "--rm", "-it", "-e", "PS1=next> ", "host", "--", "bash", "--norc", "-i")
	term, err := pty.StartWithSize(cmd, &pty.Winsize{Cols: 91, Rows: 33})
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	// Only to end a test that would hang: nothing depends on how long it takes.
	defer time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
	s := &screen{t: t, term: term}
	s.expect("next> ")
	s.send("stty size; echo o''k\n")
	s.expect("33 91")
	s.expect("ok")
	if err := pty.Setsize(term, &pty.Winsize{Cols: 71, Rows: 22}); err != nil {
		t.Fatal(err)
	}
	s.send("while [ \"$(stty size)\" != '22 71' ]; do sleep 0.05; done; echo res''ized\n")
	s.expect("resized")
	s.expect("next> ")
	s.send("sh -c 'echo be\"\"gun; exec sleep 1000'; echo st''ill\n")
	s.expect("begun")
	s.send("\x03") // ctrl-c ends sleep, not us
	s.expect("next> ")
	s.send("echo al''ive; exit 9\n")
	s.expect("alive")
	_, _ = io.Copy(io.Discard, term) // to the end: EIO
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("ended with %v; screen: %q", cmd.ProcessState, s.seen)
	}
}

// screen reads a terminal until what is expected appears.
type screen struct {
	t    *testing.T
	term *os.File
	seen string
}

func (s *screen) send(keys string) {
	s.t.Helper()
	if _, err := s.term.WriteString(keys); err != nil {
		s.t.Fatal(err)
	}
}

func (s *screen) expect(what string) {
	s.t.Helper()
	buffer := make([]byte, 4096)
	for !strings.Contains(s.seen, what) {
		n, err := s.term.Read(buffer)
		if err != nil {
			s.t.Fatalf("%v while waiting for %q; seen: %q", err, what, s.seen)
		}
		s.seen += string(buffer[:n])
	}
	_, s.seen, _ = strings.Cut(s.seen, what)
}

// conformance: FR2.4
func TestCopyKeepsContentsModesAndLinks(t *testing.T) {
	c := newNode(t)
	c.ok("create", "host", "--name", "box")
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	write(t, filepath.Join(tree, "plain"), "plain\n", 0o644)
	write(t, filepath.Join(tree, "sub", "run"), "#!/bin/sh\n", 0o755)
	write(t, filepath.Join(tree, "odd \n\xff name"), "odd", 0o600)
	if err := os.Symlink("sub/run", filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	c.ok("cp", tree, "box:/tmp/")
	c.ok("cp", tree+"/.", "box:/tmp/contents")
	c.ok("cp", "box:/tmp/tree", filepath.Join(dir, "back"))
	c.ok("cp", "box:/tmp/contents/.", filepath.Join(dir, "back2"))
	for _, back := range []string{"back", "back2"} {
		diff := exec.Command("diff", "-r", "--no-dereference", tree, filepath.Join(dir, back))
		if out, err := diff.CombinedOutput(); err != nil {
			t.Errorf("%s differs: %s", back, out)
		}
		if info, err := os.Stat(filepath.Join(dir, back, "sub", "run")); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", back, info, err)
		}
	}
	if r := c.run(strings.NewReader("piped"), "cp", "-", "box:/tmp/piped"); r.code != 0 {
		t.Error(r.errors)
	}
	if got := c.ok("cp", "box:/tmp/piped", "-"); got != "piped" {
		t.Errorf("got %q", got)
	}
	c.fails(1, "nobody", "cp", "nobody:/x", dir)
	c.fails(1, "both sides", "cp", "box:/x", "box:/y")
	c.fails(1, "nosuch", "cp", filepath.Join(dir, "nosuch"), "box:/tmp")
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// conformance: FR2.4
func TestSyncCarriesChangesBothWaysAndReportsConflicts(t *testing.T) {
	c := newNode(t)
	c.ok("create", "host", "--name", "box")
	dir := t.TempDir()
	inside := func(script string) string { return c.ok("exec", "box", "--", "sh", "-c", "cd /tmp/w && "+script) }
	sync := func(code int, say string, flags ...string) {
		t.Helper()
		r := c.run(nil, append([]string{"sync", "--once", dir, "box:/tmp/w"}, flags...)...)
		if r.code != code || !strings.Contains(strings.Join(strings.Fields(r.out), " "), say) {
			t.Fatalf("sync %v ended with %d: %s%s", flags, r.code, r.out, r.errors)
		}
	}
	write(t, filepath.Join(dir, "a", "here"), "from here", 0o755)
	sync(0, "-> a/here")
	if got := inside("cat a/here; stat -c %a a/here"); got != "from here755" {
		t.Errorf("inside: %q", got)
	}
	inside("echo there > b; echo same > same")
	write(t, filepath.Join(dir, "same"), "same\n", 0o644)
	sync(0, "<- b")
	if got, err := os.ReadFile(filepath.Join(dir, "b")); err != nil || string(got) != "there\n" {
		t.Errorf("here: %q, %v", got, err)
	}
	inside("echo mine > b")
	write(t, filepath.Join(dir, "b"), "yours, and longer\n", 0o644)
	sync(1, "conflict b")
	if got := inside("cat b"); got != "mine" {
		t.Errorf("a conflict was overwritten: %q", got)
	}
	sync(0, "-> b", "--prefer", "host")
	if got := inside("cat b"); got != "yours, and longer" {
		t.Errorf("inside: %q", got)
	}
}

func TestContinuousSyncFollowsBothSidesAndDeletes(t *testing.T) {
	c := newNode(t)
	c.ok("create", "host", "--name", "box")
	dir := t.TempDir()
	write(t, filepath.Join(dir, "first"), "1", 0o644)
	cmd := c.command(t, "sync", dir, "box:/tmp/w")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := &reader{t: t, r: out}
	lines.until("-> first")
	write(t, filepath.Join(dir, "new", "second"), "2", 0o644)
	lines.until("-> new/second")
	c.ok("exec", "box", "--", "sh", "-c", "echo 3 > /tmp/w/third")
	lines.until("<- third")
	if err := os.Remove(filepath.Join(dir, "first")); err != nil {
		t.Fatal(err)
	}
	lines.until("-> delete first")
	c.ok("exec", "box", "--", "rm", "-r", "/tmp/w/new")
	lines.until("<- delete new/second")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ctrl-c: %v", err)
	}
	if got := c.ok("exec", "box", "--", "ls", "/tmp/w"); got != "third" {
		t.Errorf("inside: %q", got)
	}
}

// reader reads lines until one says what is waited for.
type reader struct {
	t    *testing.T
	r    io.Reader
	seen string
}

func (r *reader) until(what string) {
	r.t.Helper()
	want := strings.Join(strings.Fields(what), " ")
	for {
		for {
			line, rest, ok := strings.Cut(r.seen, "\n")
			if !ok {
				break
			}
			r.seen = rest
			if strings.Join(strings.Fields(line), " ") == want {
				return
			}
		}
		buffer := make([]byte, 4096)
		n, err := r.r.Read(buffer)
		if err != nil {
			r.t.Fatalf("%v while waiting for %q", err, what)
		}
		r.seen += string(buffer[:n])
	}
}

// conformance: FR5.1 FR5.2 FR5.3
func TestSnapshotRestoreAndForkKeepRunningProcesses(t *testing.T) {
	c := newNode(t)
	c.ok("create", "host", "--name", "box")
	pid := c.ok("exec", "box", "--", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
	snap := c.ok("snapshot", "box", "-q")
	c.ok("rm", "-f", "box")
	c.ok("restore", snap, "--name", "again")
	ids := strings.Fields(c.ok("fork", "again", "-n", "3", "-q"))
	if len(ids) != 3 {
		t.Fatalf("forks: %v", ids)
	}
	for _, id := range append(ids, "again") {
		if got := c.ok("exec", id, "--", "cat", "/proc/"+pid+"/comm"); got != "sleep" {
			t.Errorf("%s: %q", id, got)
		}
	}
	c.ok("exec", "again", "--", "sh", "-c", "echo x > /tmp/new; rm -f /etc/hostname")
	if diff := c.ok("diff", "again"); !strings.Contains(diff, "A /tmp/new") {
		t.Errorf("diff: %q", diff)
	}
}

func TestLogsPortsEventsAndCompletionOfARunningServer(t *testing.T) {
	c := newNode(t)
	c.ok("run", "-d", "--name", "web", "-p", "0:7000", "host", "--", "sh", "-c", "echo starting; exec python3 -m http.server 7000")
	for c.run(nil, "exec", "web", "--", "python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7000/')").code != 0 {
		if t.Context().Err() != nil {
			t.Fatal("the server does not come up")
		}
	}
	if got := c.ok("logs", "web"); !strings.HasPrefix(got, "starting") {
		t.Errorf("logs: %q", got)
	}
	host := c.ok("port", "web", "-q")
	if out, err := exec.Command("curl", "-sf", "http://"+host+"/").Output(); err != nil || !strings.Contains(string(out), "Directory listing") {
		t.Errorf("through the published port: %v: %s", err, out)
	}
	if got := c.ok("__complete", "exec", "w"); !strings.HasPrefix(got, "web\t") {
		t.Errorf("completion: %q", got)
	}
	c.fails(125, "did you mean web", "exec", "wb", "--", "true")
	c.fails(1, "is running", "rm", "web")
	if got := c.ok("ls", "-q"); len(got) != 20 {
		t.Errorf("ls -q: %q", got)
	}
	if got := c.ok("stats", "web"); !strings.Contains(got, "web") {
		t.Errorf("stats: %q", got)
	}
}

func TestWorktreeWorkComesBackByMerge(t *testing.T) {
	c := newNode(t)
	repo := t.TempDir()
	git := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("git", append([]string{"-C", repo, "-c", "user.name=t", "-c", "user.email=t@localhost"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("git %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	git("init", "-q", "-b", "main")
	write(t, filepath.Join(repo, "file"), "one\n", 0o644)
	git("add", ".")
	git("commit", "-q", "-m", "first")
	c.ok("create", "--runtime", "worktree", "--name", "fix", repo)
	c.ok("exec", "fix", "--", "sh", "-c", "echo two >> file; echo new > added")
	if diff := c.ok("diff", "fix"); !strings.Contains(diff, "+two") || !strings.Contains(diff, "added") {
		t.Errorf("diff: %s", diff)
	}
	if got := c.ok("merge", "fix", "--squash", "-m", "fixed"); !strings.Contains(got, "M added") {
		t.Errorf("merge: %q", got)
	}
	if got, err := os.ReadFile(filepath.Join(repo, "file")); err != nil || string(got) != "one\ntwo\n" {
		t.Errorf("in the repository: %q, %v", got, err)
	}
	if got := git("log", "--format=%s", "-1"); got != "fixed\n" {
		t.Errorf("log: %q", got)
	}
	c.ok("create", "host", "--name", "other")
	c.fails(1, "not the working tree", "merge", "other")
}
