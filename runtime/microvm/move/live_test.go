package move_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/serial"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/kernel"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/runtime/microvm/move"
	"github.com/atoll-run/atoll/runtime/microvm/qemu"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) { os.Exit(microvmtest.Main(m)) }

// maker starts machines that are alike.
type maker struct {
	driver *qemu.Driver
	groups *cgroup.Parent
	kernel kernel.Kernel
	empty  string
	size   int64 // of memory, bytes
}

func newMaker(t *testing.T) *maker {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: QEMU gets namespaces and a control group")
	}
	m := &maker{kernel: microvmtest.Kernel(t)}
	var err error
	if m.driver, err = qemu.Open(t.Context(), ""); err != nil {
		t.Fatalf("scripts/deps installs QEMU: %v", err)
	}
	m.driver.Emulate()
	m.size = m.driver.Memory(192 << 20)
	if m.groups, err = cgroup.Open(fmt.Sprintf("atoll-move-test-%d", os.Getpid())); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := m.groups.Group("").Remove(); err != nil {
			t.Error(err)
		}
	})
	if m.empty, err = disk.Empty(t.Context(), t.TempDir(), disk.MinSize); err != nil {
		t.Fatal(err)
	}
	return m
}

// started is a machine and the uppermost layer of its disk.
type started struct {
	vmm.Machine
	layer string
}

// start starts a machine in memory: one that boots, or one that waits.
func (m *maker) start(t *testing.T, name string, memory *os.File, boots bool) started {
	t.Helper()
	dir := t.TempDir()
	layer := filepath.Join(dir, "layer")
	if err := disk.MakeLayer(layer, disk.MinSize); err != nil {
		t.Fatal(err)
	}
	group := m.groups.Group(name)
	if err := group.Create(); err != nil {
		t.Fatal(err)
	}
	c := vmm.Config{
		Dir: dir, Port: wire.MachineSerial, Group: group, Memory: memory, Size: m.size, Shared: boots, CPUs: 1,
		Disks: []vmm.Disk{{Serial: wire.DiskRoot, Layers: []string{microvmtest.Root(t)}}, {Serial: wire.DiskOverlay, Layers: []string{m.empty, layer}, Writable: true}},
	}
	if boots {
		c.Kernel = &vmm.Kernel{Image: m.kernel.Vmlinux, Initrd: m.kernel.Initramfs, Args: kernel.Args}
	}
	machine, err := m.driver.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Tests kill some machines themselves.
		if err := machine.Kill(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		if err := group.Remove(); err != nil {
			t.Error(err)
		}
	})
	return started{machine, layer}
}

// through moves a machine and lets it run where it has arrived, after look, which may be nil.
func through(ctx context.Context, from, to started, base move.Base, look func() error) (r report, err error) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	near, far := net.Pipe()
	arrived := make(chan error, 1)
	go func() {
		_, err := move.In(ctx, to, to.layer, base, far)
		if err != nil {
			cancel()
		}
		arrived <- err
	}()
	r.Stats, r.stopped, err = move.Out(ctx, from, from.layer, base, near)
	near.Close()
	sent := err
	err = errors.Join(err, <-arrived)
	if err == nil && look != nil {
		err = look()
	}
	if err == nil {
		err = to.Resume(ctx)
	}
	if err != nil && sent == nil {
		err = errors.Join(err, from.Resume(context.WithoutCancel(ctx)))
	}
	r.downtime, r.total = time.Since(r.stopped), time.Since(began)
	return r, err
}

// report is what a move took.
type report struct {
	move.Stats
	stopped         time.Time
	downtime, total time.Duration
}

// compare looks whether two machines that stand still have the same memory.
func compare(a, b vmm.Machine, size int64) error {
	const unit = 1 << 20
	left, right := make([]byte, unit), make([]byte, unit)
	for at := int64(0); at < size; at += unit {
		n := min(unit, size-at)
		first := uint32(at / vmm.PageSize)
		if err := errors.Join(a.ReadPages(left[:n], first), b.ReadPages(right[:n], first)); err != nil {
			return err
		}
		if !bytes.Equal(left[:n], right[:n]) {
			return fmt.Errorf("memory from %#x on is not what it was", at)
		}
	}
	return nil
}

func (m *maker) memory(t *testing.T) *os.File {
	t.Helper()
	f, err := vmm.NewMemory(m.size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// template copies the memory of a machine, which stands still for that.
func (m *maker) template(t *testing.T, machine vmm.Machine) (*os.File, move.Base) {
	t.Helper()
	if err := machine.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	content := make([]byte, m.size)
	if err := machine.ReadPages(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := machine.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	f := m.memory(t)
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := vmm.Seal(f); err != nil {
		t.Fatal(err)
	}
	base, err := unix.Mmap(int(f.Fd()), 0, int(m.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(base) })
	return f, move.Base{Memory: base, Digest: "the template"}
}

// shell opens a session with a machine's agent and returns what runs commands.
func shell(t *testing.T, m vmm.Machine) func(script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := m.Serial()
	if err != nil {
		t.Fatal(err)
	}
	session, err := serial.Open(ctx, conn)
	if err != nil {
		t.Fatalf("%v (%s)", err, m.Cause())
	}
	t.Cleanup(func() { session.Close() })
	agent := guest.New(func(ctx context.Context) (net.Conn, error) { return session.Dial(ctx, sandbox.GuestPort) }, guest.Options{})
	if err := agent.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	return func(script string) string {
		t.Helper()
		out, err := agent.Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", script}})
		if err != nil || out.ExitCode != 0 {
			t.Fatalf("%s: %+v, %v", script, out, err)
		}
		return string(out.Stdout)
	}
}

// work dirties memory and writes to the disk for ever.
const work = `echo before > /file; echo 1 > /count
(while :; do head -c 2000000 /dev/urandom > /dev/shm/work; n=$(cat /count); echo $((n+1)) > /count.new; mv /count.new /count; sync; done) > /dev/null 2>&1 &`

// working waits until that has done some more.
const working = `n=$(cat /count); while [ $(cat /count) = $n ]; do sleep 0.1; done; echo moves on`

// conformance: FR5.4
func TestAMachineMovesWhileItWorks(t *testing.T) {
	m := newMaker(t)
	source := m.start(t, "source", m.memory(t), true)
	there := shell(t, source)
	memory, base := m.template(t, source)
	there(work)
	target := m.start(t, "target", memory, false)
	report, err := through(t.Context(), source, target, base, func() error { return compare(source, target, m.size) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: FR5.4 moved within %d ms, stood still %d ms with all memory compared, %d KiB sent of %d KiB that QEMU sent: %+v",
		report.total.Milliseconds(), report.downtime.Milliseconds(), report.Wire>>10, report.Read>>10, report.Stats)
	if all := m.size / vmm.PageSize; int64(report.Equal)*10 < all*9 { // what it writes meanwhile is sent again and again
		t.Errorf("of %d pages of memory only %d were left out", all, report.Equal)
	}
	if err := source.Kill(); err != nil {
		t.Fatal(err)
	}
	here := shell(t, target)
	if got := here("cat /file; " + working); got != "before\nmoves on\n" {
		t.Errorf("after the move: %q", got)
	}
	// What is read now comes from the disk that moved along.
	got := here("sync; echo 3 > /proc/sys/vm/drop_caches; cat /file; dd if=/dev/kmsg iflag=nonblock bs=8k 2>/dev/null | grep -ci 'ext4-fs error'; true")
	if strings.TrimSpace(got) != "before\n0" {
		t.Errorf("after reading the disk again: %q", got)
	}
	// And on, from what is no fork of the template any more, without comparing.
	next := m.start(t, "next", memory, false)
	if report, err = through(t.Context(), target, next, base, nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: FR5.4 moved within %d ms, stood still %d ms, %d KiB sent of %d KiB that QEMU sent", report.total.Milliseconds(),
		report.downtime.Milliseconds(), report.Wire>>10, report.Read>>10)
	if got := shell(t, next)(working); got != "moves on\n" {
		t.Errorf("after the second move: %q", got)
	}
}

// spoilt is a machine to whose state something happens on the way: when so much of
// it was sent.
type spoilt struct {
	vmm.Machine
	after int64 // bytes
	spoil func()
}

func (s spoilt) Send(ctx context.Context, state *os.File) (time.Time, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return time.Time{}, err
	}
	near, far := os.NewFile(uintptr(fds[0]), "state"), os.NewFile(uintptr(fds[1]), "state")
	defer near.Close()
	done := make(chan error, 1)
	go func() {
		_, err := io.CopyN(state, near, s.after)
		if err == nil {
			s.spoil()
			_, err = io.Copy(state, near)
		}
		near.Close() // the monitor must not wait for us
		done <- err
	}()
	stopped, err := s.Machine.Send(ctx, far)
	far.Close()
	return stopped, errors.Join(err, <-done)
}

// conformance: FR5.4
func TestAMoveThatFailsLeavesTheMachineWhereItWas(t *testing.T) {
	m := newMaker(t)
	source := m.start(t, "source", m.memory(t), true)
	here := shell(t, source)
	memory, base := m.template(t, source)
	here(work)
	for name, spoil := range map[string]func(target vmm.Machine, cancel func()){
		"the target dies":         func(target vmm.Machine, _ func()) { _ = target.Kill() },
		"the caller stops":        func(_ vmm.Machine, cancel func()) { cancel() },
		"what arrived is refused": func(vmm.Machine, func()) {},
	} {
		target := m.start(t, strings.ReplaceAll(name, " ", "-"), memory, false)
		ctx, cancel := context.WithCancel(t.Context())
		from := started{spoilt{source, 4 << 20, func() { spoil(target, cancel) }}, source.layer}
		// Without a base all memory is sent, so that this is the middle.
		_, err := through(ctx, from, target, move.Base{Digest: base.Digest}, func() error { return errors.New("no") })
		cancel()
		if err == nil {
			t.Fatalf("%s: the move succeeds", name)
		}
		if got := here(working); got != "moves on\n" {
			t.Errorf("%s: %q", name, got)
		}
	}
}
