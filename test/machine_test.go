package test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// try runs `atoll ARGS` and returns what it printed.
func (n *node) try(args ...string) (string, error) {
	out, err := n.command(args...).Output()
	return strings.TrimSpace(string(out)), err
}

// do is try for what must succeed.
func (n *node) do(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.try(args...)
	if err != nil {
		t.Fatalf("atoll %s: %v", strings.Join(args, " "), describe(err))
	}
	return out
}

// kill ends the daemon by SIGKILL.
func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	<-n.exited
}

// until waits for something that must come to be.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never happened that %s", what)
		}
	}
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	i, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// monitors returns the processes of QEMU that have files of the node.
func (n *node) monitors(t *testing.T) (pids []int) {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		dir := filepath.Dir(filepath.Dir(file))
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(line, []byte("qemu-system")) {
			continue
		}
		if to, err := os.Readlink(file); err == nil && strings.HasPrefix(to, n.home) {
			pids = append(pids, atoi(t, filepath.Base(dir)))
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// conformance: FR1.1 FR2.6 FR2.7 FR5.2 FR5.3 NFR1.3 NFR3.3
func TestMachinesKeepTheirStateAndRulesWhateverBecomesOfTheirNode(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed")
	}
	n := startNodeWith(t, "microvm")
	n.do(t, "create", "base", "--name", "one", "--memory", "256m")
	if ours, err := exec.Command("uname", "-r").Output(); err != nil || n.do(t, "exec", "one", "--", "uname", "-r") == strings.TrimSpace(string(ours)) {
		t.Errorf("it has the kernel of its host, or %v", err)
	}
	pid := n.do(t, "exec", "one", "--", "sh", "-c", `(i=0; while :; do i=$((i+1)); echo $i >>/dev/shm/n; sleep 0.1; done) >/dev/null 2>&1 & echo $!`)
	count := func(name string) int {
		t.Helper()
		return atoi(t, n.do(t, "exec", name, "--", "tail", "-n", "1", "/dev/shm/n"))
	}
	counts := func(name string) {
		t.Helper()
		from := count(name)
		until(t, name+" counts on", func() bool { return count(name) > from })
	}

	t.Run("networks are kept apart", func(t *testing.T) {
		gateway := n.do(t, "exec", "one", "--", "sed", "-n", "s/^nameserver //p", "/etc/resolv.conf")
		port := n.url[strings.LastIndex(n.url, ":")+1:]
		for _, at := range []string{gateway + ":" + port, "169.254.169.254:80"} {
			if _, err := n.try("exec", "one", "--", "curl", "-s", "-o", "/dev/null", "--connect-timeout", "3", "http://"+at+"/"); err == nil {
				t.Errorf("a machine reaches %s", at)
			}
		}
		n.do(t, "create", "base", "--name", "alone", "--memory", "256m", "--network", "none")
		if got := n.do(t, "exec", "alone", "--", "ls", "/sys/class/net"); got != "lo" {
			t.Errorf("without a network it has %s", got)
		}
		n.do(t, "rm", "-f", "alone")
	})
	t.Run("the daemon is killed", func(t *testing.T) {
		from := count("one")
		n.kill()
		n.start(t)
		if n.do(t, "exec", "one", "--", "cat", "/proc/"+pid+"/comm") == "" || count("one") < from {
			t.Error("its process is gone")
		}
		counts("one")
	})
	t.Run("forks go on", func(t *testing.T) {
		from := count("one")
		forks := strings.Fields(n.do(t, "fork", "one", "-n", "2", "-q"))
		if len(forks) != 2 {
			t.Fatalf("%v", forks)
		}
		names := []string{n.do(t, "exec", "one", "--", "hostname")}
		for _, id := range forks {
			if got := count(id); got < from {
				t.Errorf("a fork is at %d, its parent was at %d", got, from)
			}
			counts(id)
			names = append(names, n.do(t, "exec", id, "--", "hostname"))
		}
		slices.Sort(names)
		if len(slices.Compact(names)) != 3 {
			t.Errorf("names are %v", names)
		}
		n.do(t, append([]string{"rm", "-f"}, forks...)...)
	})
	t.Run("paused, and the daemon ends in good order", func(t *testing.T) {
		from := count("one")
		n.do(t, "pause", "one")
		_ = n.cmd.Process.Signal(syscall.SIGTERM)
		<-n.exited
		n.start(t)
		n.do(t, "resume", "one")
		if got := count("one"); got < from {
			t.Errorf("it is at %d and was at %d", got, from)
		}
		counts("one")
	})
	t.Run("its monitor is killed", func(t *testing.T) {
		n.do(t, "create", "base", "--name", "phoenix", "--memory", "256m", "--restart")
		n.do(t, "exec", "phoenix", "--", "touch", "/tmp/before")
		n.do(t, "rm", "-f", "one")
		for _, pid := range n.monitors(t) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		until(t, "it is made anew", func() bool {
			_, err := n.try("exec", "phoenix", "--", "sh", "-c", "! test -e /tmp/before")
			return err == nil
		})
		n.do(t, "rm", "-f", "phoenix")
	})
	t.Run("nobody uses it", func(t *testing.T) {
		n.do(t, "create", "base", "--name", "idler", "--memory", "256m", "--idle", "1s")
		n.do(t, "exec", "idler", "--", "touch", "/tmp/there")
		until(t, "it is paused", func() bool { return n.do(t, "ls", "-q", "--state", "paused") != "" })
		if _, err := n.try("exec", "idler", "--", "test", "-e", "/tmp/there"); err != nil {
			t.Errorf("the next use does not resume it: %v", describe(err))
		}
	})
}

func TestWithoutQEMUItSaysHowToGetIt(t *testing.T) {
	home, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(home) })
	cmd := exec.Command(shared.bin, "run", "--rm", "--runtime", "microvm", "base", "--", "true")
	cmd.Env = append(os.Environ(), "ATOLL_HOME="+home, "PATH="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("apt install")) || !bytes.Contains(out, []byte("qemu-system-x86")) {
		t.Errorf("%v\n%s", err, out)
	}
}
