package move_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/kernel"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/runtime/microvm/move"
)

func TestMain(m *testing.M) { os.Exit(microvmtest.Main(m)) }

const (
	memoryName = "atoll-move-test"
	memorySize = microvmtest.Memory << 10
)

// memfd makes the file of a machine's memory.
func memfd(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), memoryName)
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(memorySize); err != nil {
		t.Fatal(err)
	}
	return f
}

// machine returns the arguments of one whose memory is descriptor 5; share says
// that it writes there.
func machine(t *testing.T, empty, share string) []string {
	t.Helper()
	layer := filepath.Join(t.TempDir(), "layer.qcow2")
	if err := disk.MakeLayer(layer, disk.MinSize); err != nil {
		t.Fatal(err)
	}
	return slices.Concat(
		[]string{"-M", "microvm,acpi=on,rtc=on,memory-backend=ram", "-global", "migration.send-configuration=off",
			"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=/proc/self/fd/5,share=%s", memorySize, share),
			"-device", "virtio-serial-device"},
		microvmtest.Disk("root", "raw", microvmtest.Root(t), true),
		[]string{
			"-blockdev", "driver=file,node-name=empty,filename=" + empty + ",read-only=on",
			"-blockdev", "driver=qcow2,node-name=layer,backing=empty,file.driver=file,file.filename=" + layer,
			"-device", "virtio-blk-device,drive=layer",
		})
}

// call makes calls of QMP that must succeed.
func call(t *testing.T, m *microvmtest.Machine, command string, args map[string]any, files ...*os.File) {
	t.Helper()
	if err := m.QMP.Call(command, args, nil, files...); err != nil {
		t.Fatal(err)
	}
}

func await(t *testing.T, m *microvmtest.Machine, name, text string) microvmtest.Event {
	t.Helper()
	e, err := m.QMP.Await(name, text)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// channel gives QEMU one end of a line under a name and returns the other. Its
// buffers are small, for QEMU takes what they swallow for what has arrived.
func channel(t *testing.T, m *microvmtest.Machine, name string) net.Conn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 64<<10); err != nil {
				t.Fatal(err)
			}
		}
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	defer near.Close()
	call(t, m, "getfd", map[string]any{"fdname": name}, far)
	far.Close()
	c, err := net.FileConn(near)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// mirror has the source copy its disk to the destination's, and keep them equal.
func mirror(t *testing.T, source, target *microvmtest.Machine) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "nbd")
	address := map[string]any{"type": "unix", "data": map[string]any{"path": socket}}
	call(t, target, "nbd-server-start", map[string]any{"addr": address})
	call(t, target, "block-export-add", map[string]any{"type": "nbd", "id": "mirror", "node-name": "layer", "name": "disk", "writable": true})
	call(t, source, "blockdev-add", map[string]any{
		"node-name": "target", "driver": "nbd", "export": "disk", "server": map[string]any{"type": "unix", "path": socket},
	})
	call(t, source, "blockdev-mirror", map[string]any{
		"job-id": "mirror", "device": "layer", "target": "target", "sync": "top", "copy-mode": "write-blocking",
	})
	await(t, source, "BLOCK_JOB_READY", "mirror")
}

// conformance: FR5.4
func TestAMachineMovesWhileItWorks(t *testing.T) {
	k := microvmtest.Kernel(t)
	empty, err := disk.Empty(t.Context(), t.TempDir(), disk.MinSize)
	if err != nil {
		t.Fatal(err)
	}
	memory := memfd(t)
	source := microvmtest.Start(t, slices.Concat(machine(t, empty, "on"), microvmtest.Boot(k.Vmlinux, k.Initramfs, kernel.Args)), memory)
	source.Connect()
	// The template is the machine as it is now.
	call(t, source, "stop", nil)
	await(t, source, "STOP", "")
	template := memfd(t)
	base, err := unix.Mmap(int(template.Fd()), 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(base)
	copy(base, source.ReadMemory(memoryName))
	call(t, source, "cont", nil)

	source.Shell(`echo before > /file; echo 1 > /count
		(while :; do head -c 2000000 /dev/urandom > /dev/shm/work; n=$(cat /count); echo $((n+1)) > /count.new; mv /count.new /count; sync; done) > /dev/null 2>&1 &`)
	target := microvmtest.Start(t, slices.Concat(machine(t, empty, "off"), []string{"-S", "-incoming", "defer"}), template)
	mirror(t, source, target)
	for _, m := range []*microvmtest.Machine{source, target} {
		capabilities := []map[string]any{{"capability": "events", "state": true}, {"capability": "pause-before-switchover", "state": true}}
		call(t, m, "migrate-set-capabilities", map[string]any{"capabilities": capabilities})
	}
	call(t, source, "migrate-set-parameters", map[string]any{"max-bandwidth": 0, "downtime-limit": 30})

	out, in := channel(t, source, "out"), channel(t, target, "in")
	left, right := net.Pipe()
	b := move.Base{Memory: bytes.Clone(base), Digest: "the template"}
	results := make(chan error, 2)
	var sent, received move.Stats
	go func() {
		var err error
		sent, err = move.Send(left, out, b)
		left.Close()
		results <- err
	}()
	go func() {
		var err error
		received, err = move.Receive(in, right, b)
		in.Close()
		results <- err
	}()
	began := time.Now()
	call(t, target, "migrate-incoming", map[string]any{"uri": "fd:in"})
	call(t, source, "migrate", map[string]any{"uri": "fd:out"})
	stopped := await(t, source, "STOP", "").Time()
	await(t, source, "MIGRATION", "pre-switchover")
	call(t, source, "block-job-cancel", map[string]any{"device": "mirror"})
	await(t, source, "BLOCK_JOB_COMPLETED", "mirror")
	call(t, source, "migrate-continue", map[string]any{"state": "pre-switchover"})
	arrived := await(t, target, "MIGRATION", "completed").Time()
	out.Close()
	for range 2 {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	total := time.Since(began)
	if want, got := source.ReadMemory(memoryName), target.ReadMemory(memoryName); !bytes.Equal(got, want) {
		differ := 0
		for at := 0; at < memorySize; at += 4096 {
			if !bytes.Equal(got[at:at+4096], want[at:at+4096]) {
				differ++
			}
		}
		t.Fatalf("%d pages differ from the source's", differ)
	}
	source.Kill()
	resume := time.Now()
	call(t, target, "nbd-server-stop", nil)
	call(t, target, "cont", nil)
	t.Logf("measured: FR5.4 moved within %d ms, stood still %d ms, %d KiB sent of %d KiB that QEMU sent (%+v; received %+v)", total.Milliseconds(),
		(arrived.Sub(stopped) + time.Since(resume)).Milliseconds(), sent.Wire>>10, sent.Read>>10, sent, received)

	target.Connect()
	if got := target.Shell("cat /file"); got != "before\n" {
		t.Errorf("a file that was written before the move holds %q", got)
	}
	if got := target.Shell("n=$(cat /count); while [ $(cat /count) = $n ]; do sleep 0.1; done; echo moves on"); got != "moves on\n" {
		t.Errorf("the work goes on: %q", got)
	}
	if got := target.Shell("grep -c . /proc/mounts > /dev/null; sync; echo 3 > /proc/sys/vm/drop_caches; cat /file; dd if=/dev/kmsg iflag=nonblock bs=8k 2>/dev/null | grep -ci 'ext4-fs error' ; true"); strings.TrimSpace(got) != "before\n0" {
		t.Errorf("after reading the disk again: %q", got)
	}
}
