package microvmtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/serial"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Memory is how much memory the machines have, in KiB. QEMU before 9.0 loses pages
// of an emulated machine that is moved when this is a multiple of 256 KiB.
const Memory = 262152

// Machine is a QEMU.
type Machine struct {
	Agent *guest.Client // the guest protocol
	Maker *guest.Client // the calls of the machine's maker
	Port  *serial.Session
	PID   int
	QMP   *QMP

	tb   testing.TB
	log  bytes.Buffer
	cmd  *exec.Cmd
	done chan struct{}
	line net.Conn
}

// Start starts QEMU with the arguments that make a machine what it is: kernel or
// incoming state, memory, disks; files are descriptors 5 and up. The machine ends
// with the test.
func Start(tb testing.TB, extra []string, files ...*os.File) *Machine {
	tb.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		tb.Fatalf("scripts/deps installs QEMU: %v", err)
	}
	dir, err := os.MkdirTemp("", "qemu-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	near, far := pair(tb)
	ctlNear, ctlFar := pair(tb)
	args := slices.Concat([]string{
		"-accel", "tcg,thread=single,tb-size=64", "-cpu", "Nehalem-v1,+arat", "-smp", "1", "-m", fmt.Sprintf("%dk", Memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "file:" + filepath.Join(dir, "console"),
		"-chardev", "socket,id=qmp,fd=4", "-mon", "chardev=qmp,mode=control",
		"-chardev", "socket,id=agent,fd=3",
	}, extra, []string{"-device", "virtserialport,chardev=agent,name=" + wire.MachineSerial})
	m := &Machine{tb: tb, cmd: exec.Command(path, args...), done: make(chan struct{}), line: near}
	m.cmd.ExtraFiles = append([]*os.File{far, ctlFar}, files...)
	m.cmd.Stderr = &m.log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the death signal is that of the thread that started the process
		err := m.cmd.Start()
		started <- err
		if err == nil {
			_ = m.cmd.Wait()
		}
		close(m.done)
	}()
	if err := <-started; err != nil {
		tb.Fatal(err)
	}
	far.Close()
	ctlFar.Close()
	m.PID = m.cmd.Process.Pid
	tb.Cleanup(func() {
		m.Kill()
		if tb.Failed() {
			console, _ := os.ReadFile(filepath.Join(dir, "console"))
			tb.Logf("qemu: %s\nconsole: %s", m.log.String(), console)
		}
	})
	if m.QMP, err = newQMP(ctlNear); err != nil {
		tb.Fatalf("QMP: %v: %s", err, m.log.String())
	}
	return m
}

// MicroVM returns the arguments of a machine of the type that has no PCI.
func MicroVM() []string {
	return []string{"-M", "microvm,acpi=on,rtc=on", "-device", "virtio-serial-device"}
}

// Disk returns the arguments of a disk with the format, raw or qcow2.
func Disk(id, format, path string, readOnly bool) []string {
	mode := "off"
	if readOnly {
		mode = "on"
	}
	return []string{
		"-blockdev", fmt.Sprintf("driver=%s,node-name=%s,read-only=%s,discard=unmap,file.driver=file,file.filename=%s,file.locking=off", format, id, mode, path),
		"-device", fmt.Sprintf("virtio-blk-device,drive=%s", id),
	}
}

// Boot returns the arguments that boot a kernel with the agent.
func Boot(vmlinux, initramfs, args string) []string {
	line := fmt.Sprintf("console=ttyS0 quiet reboot=t panic=-1 8250.nr_uarts=1 no_timer_check tsc=reliable tsc_early_khz=%d cryptomgr.notests "+
		"random.trust_cpu=on audit=0 apparmor=0 mitigations=off ", tscKHz())
	return []string{"-kernel", vmlinux, "-initrd", initramfs, "-append", line + args}
}

// tscKHz is the rate of the host's time stamp counter.
func tscKHz() int {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 2_000_000
	}
	for line := range strings.Lines(string(text)) {
		var mhz float64
		if n, _ := fmt.Sscanf(line, "cpu MHz : %f", &mhz); n == 1 {
			return int(mhz * 1000)
		}
	}
	return 2_000_000
}

// ReadMemory returns the content of the memory that the machine has mapped from
// the file with the name; the machine must stand still.
func (m *Machine) ReadMemory(name string) []byte {
	m.tb.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", m.PID))
	if err != nil {
		m.tb.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", m.PID))
	if err != nil {
		m.tb.Fatal(err)
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		if n, _ := fmt.Sscanf(line, "%x-%x", &from, &to); n != 2 || !strings.Contains(line, name) {
			continue
		}
		data := make([]byte, to-from)
		if _, err := mem.ReadAt(data, from); err != nil {
			m.tb.Fatal(err)
		}
		return data
	}
	m.tb.Fatalf("nothing of %q is mapped:\n%s", name, maps)
	return nil
}

// pair returns two ends of a line: one for us, one for a child.
func pair(tb testing.TB) (net.Conn, *os.File) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "near")
	defer f.Close()
	near, err := net.FileConn(f)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { near.Close() })
	return near, os.NewFile(uintptr(fds[1]), "far")
}

// Connect opens a session with the agent and waits until it answers.
func (m *Machine) Connect() {
	m.tb.Helper()
	ctx, cancel := context.WithTimeout(m.tb.Context(), time.Minute)
	defer cancel()
	go func() { // a machine that dies is not waited for
		select {
		case <-m.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	var err error
	if m.Port, err = serial.Open(ctx, m.line); err != nil {
		m.tb.Fatal(err)
	}
	m.tb.Cleanup(func() { m.Port.Close() })
	client := func(port int) *guest.Client {
		return guest.New(func(ctx context.Context) (net.Conn, error) { return m.Port.Dial(ctx, port) }, guest.Options{})
	}
	m.Agent, m.Maker = client(sandbox.GuestPort), client(serial.MachinePort)
	if err := m.Agent.WaitHealthy(ctx); err != nil {
		m.tb.Fatal(err)
	}
}

// Shell runs a command in the machine and returns what it prints.
func (m *Machine) Shell(script string) string {
	m.tb.Helper()
	out, err := m.Agent.Run(m.tb.Context(), guest.Command{Args: []string{"/bin/sh", "-c", script}})
	if err != nil || out.ExitCode != 0 {
		m.tb.Fatalf("%s: %+v, %v", script, out, err)
	}
	return string(out.Stdout)
}

// Kill ends QEMU.
func (m *Machine) Kill() {
	_ = m.cmd.Process.Kill()
	<-m.done
}

// QMP is a connection to QEMU's monitor. Calls are made one at a time.
type QMP struct {
	mu     sync.Mutex
	conn   *net.UnixConn
	in     *bufio.Scanner
	events []Event
}

// Event is something that QEMU told without being asked.
type Event struct {
	Name      string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Time is when it happened, by the host's clock.
func (e Event) Time() time.Time { return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000) }

type reply struct {
	Event
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
}

func newQMP(conn net.Conn) (*QMP, error) {
	q := &QMP{conn: conn.(*net.UnixConn), in: bufio.NewScanner(conn)}
	q.in.Buffer(nil, 16<<20)
	if !q.in.Scan() {
		return nil, errors.New("no greeting")
	}
	return q, q.Call("qmp_capabilities", nil, nil)
}

// Call makes a call with the arguments; files are passed along with it.
func (q *QMP) Call(command string, args map[string]any, out any, files ...*os.File) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	body := map[string]any{"execute": command}
	if args != nil {
		body["arguments"] = args
	}
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := q.conn.WriteMsgUnix(append(text, '\n'), rights, nil); err != nil {
		return err
	}
	for {
		r, err := q.next()
		switch {
		case err != nil:
			return err
		case r.Name != "":
			q.events = append(q.events, r.Event)
		case r.Error != nil:
			return fmt.Errorf("%s: %s", command, r.Error.Desc)
		case out != nil:
			return json.Unmarshal(r.Return, out)
		default:
			return nil
		}
	}
}

func (q *QMP) next() (reply, error) {
	var r reply
	if !q.in.Scan() {
		return r, errors.Join(errors.New("QEMU is gone"), q.in.Err())
	}
	return r, json.Unmarshal(q.in.Bytes(), &r)
}

// Await returns the first event with the name and a text in its data that was not
// awaited yet.
func (q *QMP) Await(name, text string) (Event, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for i, e := range q.events {
			if e.Name == name && strings.Contains(string(e.Data), text) {
				q.events = append(q.events[:i:i], q.events[i+1:]...)
				return e, nil
			}
		}
		r, err := q.next()
		if err != nil {
			return Event{}, err
		}
		if r.Name != "" {
			q.events = append(q.events, r.Event)
		}
	}
}
