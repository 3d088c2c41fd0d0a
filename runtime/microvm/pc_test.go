package microvm_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

// diskSpec is a spec of a full disk image at path, with a network of its own.
func diskSpec(t *testing.T, id, path string, n byte) sandbox.Spec {
	t.Helper()
	return sandbox.Spec{
		ID: id, Hostname: "vm-" + id, Root: sandbox.Root{Kind: sandbox.RootDisk, Path: path, Digest: "blake3:" + id},
		Resources: sandbox.Resources{Memory: 384 << 20, Disk: 2 << 30}, Network: sandbox.NetworkSandbox, Link: runtimetest.NewLink(t, n),
	}
}

// tellConsole shows the end of a machine's console when the test has failed.
func tellConsole(t *testing.T, r *microvm.Runtime, id string) {
	if !t.Failed() {
		return
	}
	all, _ := r.List(context.Background())
	t.Logf("%+v", all)
	text, _, err := r.Console(context.Background(), id, 0)
	t.Logf("the console of %s, %v: %s", id, err, text[max(0, len(text)-8000):])
}

// conformance: V6 FR5.2
func TestACloudImageBootsWithTheAgentAndIsForked(t *testing.T) {
	t.Parallel()
	raw := microvmtest.CloudImage(t)
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", raw, path).CombinedOutput(); err != nil {
		t.Fatalf("scripts/deps installs qemu-img: %v: %s", err, out)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, t.TempDir())
	t.Cleanup(func() { destroyAll(t, r) })
	s := diskSpec(t, "whole", path, 1)
	s.Boot = &sandbox.Boot{UserData: []byte("#cloud-config\nwrite_files:\n- {path: /etc/told, content: by the user}\nruncmd:\n- echo ran > /etc/ran\n")}
	t.Cleanup(func() { tellConsole(t, r, s.ID) })
	begin := time.Now()
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: V6 a cloud image's agent answers after %.0f s, emulated", time.Since(begin).Seconds())
	sh(t, r, s.ID, "for i in $(seq 600); do [ -e /run/cloud-init/result.json ] && break; sleep 0.5; done; sync")
	for script, want := range map[string]string{
		"cat /etc/told /etc/ran":                                              "by the userran\n",
		"uname -n":                                                            "vm-whole\n",
		"systemctl is-active atoll-guest":                                     "active\n",
		"ls /sys/class/net | sort | xargs":                                    "eth0 lo\n",
		"ip -4 -o addr show dev eth0 | awk '{print $4}'":                      s.Link.Address.String() + "\n",
		"ip -4 route show default | awk '{print $3}'":                         s.Link.Gateway.String() + "\n",
		"[ $(df --output=size -m / | tail -n 1) -gt 1900 ] && id -u":          "0\n", // it grew with the disk
		fmt.Sprintf("nc -N %s 8080 </dev/null | cut -d: -f1", s.Link.Gateway): "hello " + s.Link.Address.Addr().String() + "\n",
	} {
		if got := sh(t, r, s.ID, script); got != want {
			t.Errorf("%q prints %q, want %q", script, got, want)
		}
	}
	console, next, err := r.Console(t.Context(), s.ID, 0)
	if err != nil || !strings.Contains(string(console), "loading the kernel") || !strings.Contains(string(console), "login:") {
		t.Errorf("the console says %q, %v", console, err)
	}
	if more, _, err := r.Console(t.Context(), s.ID, next); err != nil || strings.Contains(string(more), "loading the kernel") {
		t.Errorf("what was read is told again: %q, %v", more, err)
	}
	if err := r.Changes(t.Context(), s.ID, io.Discard); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("changes of a whole disk: %v", err)
	}
	forkDisk(t, r, s)
	if after, err := os.Stat(path); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("the image was written: %v", err)
	}
}

// forkDisk forks a machine and sees that both go on, each with a disk, a name and an
// address of its own.
func forkDisk(t *testing.T, r *microvm.Runtime, s sandbox.Spec) {
	t.Helper()
	state := t.TempDir()
	sh(t, r, s.ID, "echo parent > /mark; sync; systemd-run --quiet --unit counts sleep 10000")
	if err := r.Snapshot(t.Context(), s.ID, state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	sh(t, r, s.ID, "echo later > /mark; sync")
	fork := s
	fork.ID, fork.Hostname, fork.Link = "fork", "vm-fork", runtimetest.NewLink(t, 2)
	if err := r.Restore(t.Context(), fork, state); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]string{
		"cat /mark": "parent\n", "uname -n": "vm-fork\n", "systemctl is-active counts": "active\n",
		fmt.Sprintf("nc -N %s 8080 </dev/null | cut -d: -f1", fork.Link.Gateway): "hello " + fork.Link.Address.Addr().String() + "\n",
	} {
		if got := sh(t, r, fork.ID, script); got != want {
			t.Errorf("in the fork %q prints %q, want %q", script, got, want)
		}
	}
	if got := sh(t, r, s.ID, "cat /mark"); got != "later\n" {
		t.Errorf("the parent reads %q", got)
	}
	// What was restored has its firmware, too: it starts anew when its system says so.
	_, _ = run(t.Context(), r, fork.ID, "echo b > /proc/sysrq-trigger") // the answer does not come
	awaitConsole(t, r, fork.ID, "loading the kernel")
}

// awaitConsole waits until a machine's console has said something.
func awaitConsole(t *testing.T, r *microvm.Runtime, id, want string) {
	t.Helper()
	for { // the test's own time bounds it
		text, _, err := r.Console(t.Context(), id, 0)
		if err != nil {
			t.Fatalf("waiting for %q: %v", want, err)
		}
		if strings.Contains(string(text), want) {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// conformance: V6
func TestACloudImageRunsWithoutTheAgent(t *testing.T) {
	t.Parallel()
	path := microvmtest.CloudImage(t)
	r := open(t, t.TempDir())
	t.Cleanup(func() { destroyAll(t, r) })
	s := diskSpec(t, "bare", path, 3)
	s.Boot = &sandbox.Boot{NoAgent: true}
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Dial(t.Context(), s.ID, sandbox.GuestPort); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("the agent that is not there is reached: %v", err)
	}
	if err := r.Snapshot(t.Context(), s.ID, t.TempDir(), sandbox.SnapshotOptions{}); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("a snapshot of a machine that cannot be told who it is: %v", err)
	}
	if err := r.Pause(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	if err := r.Resume(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	if st, err := r.Stats(t.Context(), s.ID); err != nil || st.Memory <= 0 {
		t.Errorf("it uses %+v, %v", st, err)
	}
	awaitConsole(t, r, s.ID, "loading the kernel")
}

// conformance: V6
func TestAnImageThatDoesNotBootSaysWhatItsConsoleSaid(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "empty.raw")
	sector := make([]byte, 1<<20)
	if err := os.WriteFile(path, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	r := open(t, t.TempDir())
	t.Cleanup(func() { destroyAll(t, r) })
	s := diskSpec(t, "empty", path, 4)
	s.Boot = &sandbox.Boot{Timeout: 8 * time.Second}
	err := r.Create(t.Context(), s)
	if !sandbox.Is(err, sandbox.Timeout) || !strings.Contains(err.Error(), "SeaBIOS") {
		t.Errorf("a disk without a system: %v", err)
	}
	if all, err := r.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("it left %v, %v", all, err)
	}
	s.Resources.Disk = 0
	if err := os.Truncate(path, 1<<30); err != nil {
		t.Fatal(err)
	}
	if err := r.Create(t.Context(), s); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a disk smaller than the image's: %v", err)
	}
}
