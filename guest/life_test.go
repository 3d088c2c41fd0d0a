package guest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: SPEC2
func TestTheLogHoldsProcessesAndTheMainOutput(t *testing.T) {
	a := guesttest.Start(t)
	main := sh("echo one; printf 'bad\\377byte\\r\\n'; echo err >&2; printf 'no newline'; exit 4")
	main.Tag = wire.TagMain
	if _, err := a.Run(t.Context(), main); err != nil {
		t.Fatal(err)
	}
	run(t, a.Client, "echo not logged")
	var entries []wire.LogEntry
	collect := func(e wire.LogEntry) error { entries = append(entries, e); return nil }
	if err := a.Logs(t.Context(), 0, false, collect); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for i, e := range entries {
		if e.Seq != uint64(i+1) || e.PID == 0 || time.Since(e.Time).Abs() > time.Hour {
			t.Errorf("got %+v", e)
		}
		lines = append(lines, e.Event+":"+e.Line)
	}
	all := strings.Join(lines, " ")
	for _, want := range []string{"start: ", "stdout:one", "stdout:bad\ufffdbyte ", "stderr:err", "stdout:no newline", "exit:"} {
		if !strings.Contains(all, want) {
			t.Errorf("missing %q in %q", want, all)
		}
	}
	if strings.Contains(all, "not logged") {
		t.Error("output of a process without the tag was logged")
	}
	if first := entries[0]; first.Tag != wire.TagMain || first.Cmd[0] != "sh" || first.User == "" {
		t.Errorf("got %+v", first)
	}
	for _, e := range entries {
		if e.Event == wire.LogExit && e.Tag == wire.TagMain && (e.ExitCode == nil || *e.ExitCode != 4) {
			t.Errorf("got %+v", e)
		}
	}
}

func TestTheLogIsFollowedAndBounded(t *testing.T) {
	a := guesttest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	stop := errors.New("seen enough")
	followed := make(chan error, 1)
	go func() {
		followed <- a.Logs(ctx, 0, true, func(e wire.LogEntry) error {
			if e.Line == "line 19999" {
				return stop
			}
			return nil
		})
	}()
	main := sh(`i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; head -c 100000 /dev/zero | tr '\0' x`)
	main.Tag = wire.TagMain
	if _, err := a.Run(t.Context(), main); err != nil {
		t.Fatal(err)
	}
	if err := <-followed; !errors.Is(err, stop) {
		t.Fatal(err)
	}
	cancel()
	kept, bytes, first := 0, 0, uint64(0)
	err := a.Logs(t.Context(), 5, false, func(e wire.LogEntry) error {
		if kept == 0 {
			first = e.Seq
		}
		if len(e.Line) > 8<<10 {
			t.Errorf("a line of %d bytes", len(e.Line))
		}
		kept, bytes = kept+1, bytes+len(e.Line)
		return nil
	})
	if err != nil || kept == 0 || kept > 20000 || bytes > 1<<20 || first < 1000 {
		t.Errorf("kept %d entries of %d bytes from %d on, %v", kept, bytes, first, err)
	}
}

func TestAPortIsReachedThroughTheAgent(t *testing.T) {
	a := guesttest.Start(t)
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := net.Listen(network, map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"}[network])
		if err != nil {
			t.Logf("%s: %v", network, err)
			continue
		}
		defer l.Close()
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = io.Copy(c, c) // until the other direction ends
			_, _ = io.WriteString(c, "bye")
		}()
		c, err := a.DialPort(t.Context(), l.Addr().(*net.TCPAddr).Port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "hello "); err != nil {
			t.Fatal(err)
		}
		if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "hello bye" {
			t.Fatalf("got %q %v", got, err)
		}
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, err = a.DialPort(t.Context(), l.Addr().(*net.TCPAddr).Port)
	wantKind(t, err, sandbox.Unavailable)
	_, err = a.DialPort(t.Context(), 70000)
	wantKind(t, err, sandbox.Invalid)
}

// conformance: FR2.7
func TestShutdownAsksBeforeItKills(t *testing.T) {
	a := guesttest.Start(t)
	marker := t.TempDir() + "/asked"
	polite := start(t, a.Client, sh("trap 'touch "+marker+"; exit 0' TERM; echo ready; while :; do sleep 0.02; done"))
	stubborn := start(t, a.Client, sh("trap '' TERM; (setsid sleep 1000 &); echo ready; while :; do sleep 0.02; done"))
	readUntil(t, polite, "ready")
	readUntil(t, stubborn, "ready")
	if err := a.Shutdown(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(marker); err != nil {
		t.Error("the polite process was not asked:", err)
	}
	if alive(polite.PID) || alive(stubborn.PID) {
		t.Error("a process is left")
	}
	eventually(t, "the agent ends", func() bool { return a.Health(t.Context()) != nil })
}

func TestCallsSurviveCutConnections(t *testing.T) {
	a := guesttest.Start(t)
	var mu sync.Mutex
	var conns []net.Conn
	c := guest.New(func(ctx context.Context) (net.Conn, error) {
		conn, err := a.Dial(ctx)
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, conn)
		return conn, err
	}, guest.Options{})
	for range 50 {
		for name, call := range map[string]func() error{
			"health": func() error { return c.Health(t.Context()) },
			"list":   func() error { _, err := c.List(t.Context()); return err },
			"stat":   func() error { _, err := c.Stat(t.Context(), "/"); return err },
			"init":   func() error { return c.Init(t.Context(), wire.Init{}) },
		} {
			if err := call(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			// As a restore does: the peer is gone without a word.
			mu.Lock()
			for _, conn := range conns {
				_ = conn.(*net.UnixConn).CloseRead()
				_ = conn.(*net.UnixConn).CloseWrite()
			}
			conns = nil
			mu.Unlock()
		}
	}
}

func TestACutConnectionEndsTheViewNotTheProcess(t *testing.T) {
	a := guesttest.Start(t)
	conns := make(chan net.Conn, 1)
	c := guest.New(func(ctx context.Context) (net.Conn, error) {
		conn, err := a.Dial(ctx)
		conns <- conn
		return conn, err
	}, guest.Options{})
	p := start(t, c, sh("echo ready; sleep 1000"))
	readUntil(t, p, "ready")
	(<-conns).Close()
	_, err := p.Next()
	wantKind(t, err, sandbox.Unavailable)
	if _, err := a.Connect(t.Context(), p.PID); err != nil {
		t.Fatal("the process cannot be watched again:", err)
	}
}

func TestAWrongTokenIsDeniedOnEveryWay(t *testing.T) {
	a := guesttest.Start(t)
	token := "secret"
	if err := a.Init(t.Context(), wire.Init{AccessToken: &token}); err != nil {
		t.Fatal(err)
	}
	c := a.With(guest.Options{Token: "wrong"})
	_, startErr := c.Start(t.Context(), sh("true"))
	_, listErr := c.List(t.Context())
	_, portErr := c.DialPort(t.Context(), 1)
	for name, err := range map[string]error{"stream": startErr, "call": listErr, "HTTP": c.Shutdown(t.Context(), 0), "port": portErr} {
		if !sandbox.Is(err, sandbox.Denied) {
			t.Errorf("%s: got %q: %v", name, sandbox.KindOf(err), err)
		}
	}
	run(t, a.With(guest.Options{Token: token}), "true")
}

func TestErrorsOfTheDialerKeepTheirKind(t *testing.T) {
	c := guest.New(func(context.Context) (net.Conn, error) {
		return nil, sandbox.Errorf("fake.Dial", sandbox.Conflict, "sb", "paused").WithHint("resume it")
	}, guest.Options{})
	for name, err := range map[string]error{
		"health": c.Health(t.Context()),
		"stat":   func() error { _, err := c.Stat(t.Context(), "/"); return err }(),
		"start":  func() error { _, err := c.Start(t.Context(), sh("true")); return err }(),
		"port":   func() error { _, err := c.DialPort(t.Context(), 1); return err }(),
	} {
		if !sandbox.Is(err, sandbox.Conflict) || sandbox.HintOf(err) != "resume it" {
			t.Errorf("%s: got %q: %v", name, sandbox.KindOf(err), err)
		}
	}
	nobody := guest.New(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(t.TempDir(), "missing"))
	}, guest.Options{})
	wantKind(t, nobody.Health(t.Context()), sandbox.Unavailable)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	wantKind(t, nobody.WaitHealthy(ctx), sandbox.Timeout)
}

// agent starts an agent by hand and returns a client for it.
func agent(t *testing.T, dial guest.Dial, cmd *exec.Cmd) *guest.Client {
	t.Helper()
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) {
			t.Skipf("needs the privilege to make namespaces: %v", err)
		}
		t.Fatal(err)
	}
	c := guest.New(dial, guest.Options{})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = c.Shutdown(ctx, 0) // takes its processes along; fails when it is gone
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(c.CloseIdle)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

func onSocket(path string) guest.Dial {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

func TestTheAgentIsAGoodFirstProcess(t *testing.T) {
	socket := t.TempDir() + "/s"
	// Its own root: what it writes to /etc must not be ours.
	script := "mount -t proc proc /proc && mount -t tmpfs tmpfs /etc && echo '127.0.0.1 localhost' > /etc/hosts && exec " +
		guesttest.Binary(t) + " -listen unix:" + socket
	cmd := exec.Command("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", script)
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	c := agent(t, onSocket(socket), cmd)
	if got := run(t, c, "echo $PPID"); got != "1\n" {
		t.Fatalf("it has the PID %q", got)
	}
	// Orphans come to it and are reaped; statuses are not lost.
	for i := range 20 {
		out, err := c.Run(t.Context(), sh(fmt.Sprintf("(setsid sleep 0.0%d &); exit %d", i%10, i)))
		if err != nil || out.ExitCode != i {
			t.Fatalf("got %+v %v", out.Result, err)
		}
	}
	eventually(t, "no zombie is left", func() bool {
		return strings.TrimSpace(run(t, c, "ps -eo stat= | grep -c Z || true")) == "0"
	})
	if err := c.Init(t.Context(), wire.Init{Hostname: "first.example", Entropy: []byte("0123456789abcdef")}); err != nil {
		t.Fatal(err)
	}
	if err := c.Init(t.Context(), wire.Init{Hostname: "renamed"}); err != nil {
		t.Fatal(err)
	}
	if got := run(t, c, "hostname; cat /etc/hostname /etc/hosts"); got != "renamed\nrenamed\n127.0.0.1 localhost\n127.0.1.1\trenamed\n" {
		t.Errorf("got %q", got)
	}
	if name, _ := os.Hostname(); name == "renamed" {
		t.Error("the host was renamed")
	}
	if err := c.Shutdown(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error("it ended badly:", err)
	}
}

func TestAnAgentSetsUpAMachineOfItsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	root := t.TempDir()
	program, err := os.ReadFile(guesttest.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/agent", program, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "cd " + root + " && mkdir usr && mount --bind /usr usr && ln -s usr/bin usr/lib usr/lib64 . && exec chroot . /agent -machine -listen unix:/s"
	// A process that leads a PID namespace switches off that alone.
	cmd := exec.Command("unshare", "--mount", "--uts", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", script)
	c := agent(t, onSocket(root+"/s"), cmd)
	for _, path := range []string{"/proc/1/comm", "/sys/class", "/dev/null", "/dev/pts/ptmx", "/dev/shm", "/dev/fd/0", "/run"} {
		if _, err := c.Stat(t.Context(), path); err != nil {
			t.Error(err)
		}
	}
	if got := read(t, c, "/sys/class/net/lo/flags"); got != "0x9\n" { // up, loopback
		t.Errorf("the loopback interface has flags %q", got)
	}
	p := start(t, c, guest.Command{Args: []string{"/agent", "-version"}, PTY: &guest.Size{}})
	readUntil(t, p, wire.Version)
	if err := c.Shutdown(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it does not return unless the agent ended
}

func TestAnAgentThatIsNotFirstLeavesItsHostAlone(t *testing.T) {
	a := guesttest.Start(t)
	before, _ := os.Hostname()
	future := time.Now().Add(1000 * time.Hour)
	if err := a.Init(t.Context(), wire.Init{Hostname: "stolen", Timestamp: &future}); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Hostname(); after != before {
		_ = syscall.Sethostname([]byte(before))
		t.Errorf("the host is now called %q", after)
	}
	if time.Until(future) < 999*time.Hour {
		t.Error("the host's clock was set")
	}
}

func TestAnAgentWithoutRightsServesItsOwnUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give up rights")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(dir); d != "/"; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err != nil || info.Mode()&0o001 == 0 {
			if err := os.Chmod(d, info.Mode()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
	program := dir + "/agent"
	if data, err := os.ReadFile(guesttest.Binary(t)); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(program, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-listen", "unix:"+dir+"/s")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Env = []string{"HOME=" + dir}
	c := agent(t, onSocket(dir+"/s"), cmd)
	for _, name := range []string{"", "root", "whoever"} {
		if got := run(t, c.With(guest.Options{User: name}), "id -u; pwd"); got != "65534\n"+dir+"\n" {
			t.Errorf("as %q: got %q", name, got)
		}
	}
	write(t, c, "in/home", "x")
	if e, err := c.Stat(t.Context(), "~/in/home"); err != nil || e.Path != dir+"/in/home" {
		t.Errorf("got %+v %v", e, err)
	}
	wantKind(t, c.WriteFile(t.Context(), "/etc/atoll-test", strings.NewReader("x")), sandbox.Denied)
	if err := c.Upload(t.Context(), "up", tarOf(t, entry{name: "f", data: "x"})); err != nil {
		t.Error(err)
	}
}

// limited starts an agent in a fresh cgroup with one limit.
func limited(t *testing.T, controller, fileV1, fileV2, limit string) *guest.Client {
	t.Helper()
	root, file := "/sys/fs/cgroup/"+controller, fileV1
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		root, file = "/sys/fs/cgroup", fileV2
	}
	own, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && strings.Contains(","+f[1]+",", ","+controller+",") {
			if _, err := os.Stat(root + f[2]); err == nil {
				root += f[2]
			}
		}
	}
	dir := fmt.Sprintf("%s/guesttest-%d-%s", root, os.Getpid(), controller)
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		// Registered first, so that it runs once the agent is gone.
		t.Cleanup(func() { eventually(t, "the cgroup is empty", func() bool { return os.Remove(dir) == nil }) })
		err = os.WriteFile(dir+"/"+file, []byte(limit), 0o644)
	}
	if err != nil {
		t.Skipf("needs the privilege to set limits: %v", err)
	}
	socket := t.TempDir() + "/s"
	return agent(t, onSocket(socket), exec.Command("sh", "-c",
		"echo $$ > "+dir+"/cgroup.procs && exec "+guesttest.Binary(t)+" -listen unix:"+socket))
}

func TestAForkBombDoesNotTakeTheAgentAlong(t *testing.T) {
	a := limited(t, "pids", "pids.max", "pids.max", "100")
	bomb := start(t, a, guest.Command{Args: []string{"bash", "-c", "f() { f & f & wait; }; f"}})
	go func() { _, _ = bomb.Wait(nil, nil) }()
	refused := false
	eventually(t, "the bomb uses up all processes", func() bool {
		_, err := a.Run(t.Context(), guest.Command{Args: []string{"true"}})
		refused = refused || sandbox.Is(err, sandbox.Exhausted)
		return refused
	})
	for range 50 {
		if err := a.Health(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.ReadDir(t.Context(), "/usr", 2); err != nil {
			t.Fatal(err)
		}
	}
	if err := bomb.Signal(t.Context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "commands run again", func() bool {
		out, err := a.Run(t.Context(), guest.Command{Args: []string{"true"}})
		return err == nil && out.ExitCode == 0
	})
}

func TestAProcessThatRunsOutOfMemoryIsToldApart(t *testing.T) {
	a := limited(t, "memory", "memory.limit_in_bytes", "memory.max", "60000000")
	out, err := a.Run(t.Context(), guest.Command{Args: []string{"sh", "-c", "exec tail /dev/zero"}})
	if err != nil || out.Signal != syscall.SIGKILL || !strings.Contains(out.Message, "out of memory") {
		t.Fatalf("got %+v %v", out.Result, err)
	}
	t.Logf("it says: %s", out.Message)
	if err := a.Health(t.Context()); err != nil {
		t.Fatal("the agent is gone:", err)
	}
}

func TestTheAgentListensWhereItIsTold(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	tcp := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp4", address)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	inherited := exec.Command(guesttest.Binary(t), "-listen", "fd:3")
	inherited.ExtraFiles = []*os.File{f}
	c := agent(t, tcp, inherited)
	if got := run(t, c, "ls -l /proc/self/fd | grep -c socket || true"); got != "0\n" {
		t.Errorf("a process inherited %s sockets", got)
	}
	f.Close()
	_ = inherited.Process.Kill()
	_ = inherited.Wait()
	run(t, agent(t, tcp, exec.Command(guesttest.Binary(t), "-listen", "tcp:"+address)), "true")

	out, err := exec.Command(guesttest.Binary(t), "-listen", "carrier-pigeon").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "listen address must be") {
		t.Errorf("got %q %v", out, err)
	}
}

func TestASocketLeftBehindIsReplaced(t *testing.T) {
	socket := t.TempDir() + "/s"
	first := exec.Command(guesttest.Binary(t), "-listen", "unix:"+socket)
	agent(t, onSocket(socket), first)
	_ = first.Process.Kill()
	_ = first.Wait()
	agent(t, onSocket(socket), exec.Command(guesttest.Binary(t), "-listen", "unix:"+socket))
}

func BenchmarkStartToFirstByte(b *testing.B) {
	a := guesttest.Start(b)
	for b.Loop() {
		p, err := a.Start(b.Context(), guest.Command{Args: []string{"/bin/echo", "x"}})
		if err != nil {
			b.Fatal(err)
		}
		if e, err := p.Next(); err != nil || e.Kind != guest.Stdout {
			b.Fatal(e, err)
		}
		_ = p.Close()
	}
}

func BenchmarkRun(b *testing.B) {
	a := guesttest.Start(b)
	for b.Loop() {
		if _, err := a.Run(b.Context(), guest.Command{Args: []string{"/bin/true"}}); err != nil {
			b.Fatal(err)
		}
	}
}
