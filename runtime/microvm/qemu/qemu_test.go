package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

func TestMain(m *testing.M) { os.Exit(microvmtest.Main(m)) }

func TestVersionsFromSevenTwoOnAreTaken(t *testing.T) {
	for text, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n": "7.2.22",
		"QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds)\n":    "8.2.2",
		"QEMU emulator version 10.0.0\n":                       "10.0.0",
		"QEMU emulator version 7.1.0\n":                        "",
		"QEMU emulator version 6.9\n":                          "",
		"bash: no such thing":                                  "",
	} {
		got, err := parseVersion([]byte(text))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// An emulated machine whose memory is a multiple of 256 KiB loses pages on its way.
func TestMemoryIsNeverAMultipleThatLosesPages(t *testing.T) {
	for _, size := range []int64{1, 96 << 20, 256<<20 - 1, 256 << 20, 1 << 30} {
		if got := roundMemory(size); got < size || got%memoryUnit == 0 || got%vmm.PageSize != 0 {
			t.Errorf("%d becomes %d", size, got)
		}
	}
}

func TestChangedPagesAreThoseThatAreNoLongerTheFiles(t *testing.T) {
	var entries []byte
	for _, e := range []uint64{
		0,                        // never touched
		pagePresent | pageOfFile, // read
		pagePresent, pagePresent, // written
		pageSwapped,              // written and swapped out
		pagePresent | pageOfFile, //
		pagePresent,
	} {
		entries = binary.LittleEndian.AppendUint64(entries, e)
	}
	want := []vmm.Run{{First: 12, Count: 3}, {First: 16, Count: 1}}
	if got := appendMatching(nil, entries, 10, changed); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := appendMatching([]vmm.Run{{First: 8, Count: 2}}, entries[16:24], 10, changed); !reflect.DeepEqual(got, []vmm.Run{{First: 8, Count: 3}}) {
		t.Errorf("neighbours become %v", got)
	}
}

func TestAPanicIsFoundAmongLastWords(t *testing.T) {
	for text, want := range map[string]string{
		"":     "",
		"fine": "",
		"[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000200\r\n[ 1.1] CPU: 0": "Attempted to kill init! exitcode=0x00000200",
		"Kernel panic - not syncing: \x1b[31mred\xff":                                                     "[31mred",
	} {
		if got := panicLine(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	if got := panicLine("Kernel panic - not syncing: " + strings.Repeat("x", 1<<20)); len(got) > 200 {
		t.Errorf("a reason of %d bytes", len(got))
	}
}

func TestCallsAreAnsweredInAnyOrderAmongEvents(t *testing.T) {
	ours, theirs := pair(t)
	events := make(chan string, 16)
	go func() { // a QEMU that answers the second call first
		in := bufio.NewScanner(theirs)
		say := func(text string) { _, _ = theirs.Write([]byte(text + "\r\n")) }
		say(`{"QMP": {"version": {}, "capabilities": []}}`)
		var held []json.RawMessage
		for in.Scan() {
			var c struct {
				Execute string          `json:"execute"`
				ID      json.RawMessage `json:"id"`
			}
			if json.Unmarshal(in.Bytes(), &c) != nil {
				return
			}
			switch c.Execute {
			case "qmp_capabilities":
				say(`{"return": {}, "id": ` + string(c.ID) + `}`)
			case "refuse":
				say(`{"error": {"class": "GenericError", "desc": "no"}, "id": ` + string(c.ID) + `}`)
			case "hang":
			default:
				if held = append(held, c.ID); len(held) == 2 {
					say(`{"event": "STOP", "timestamp": {}}`)
					say(`{"return": {"n": 2}, "id": ` + string(held[1]) + `}`)
					say(`{"return": {"n": 1}, "id": ` + string(held[0]) + `}`)
				}
			}
		}
	}()
	c, err := openQMP(t.Context(), ours, func(e event) { events <- e.Name })
	if err != nil {
		t.Fatal(err)
	}
	first := make(chan int, 1)
	var n struct{ N int }
	go func() {
		var n struct{ N int }
		_ = c.call(t.Context(), "one", nil, &n)
		first <- n.N
	}()
	for c.pending() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := c.call(t.Context(), "two", map[string]any{"x": 1}, &n); err != nil || n.N+<-first != 3 {
		t.Errorf("the answers went astray: %v", err)
	}
	if e := <-events; e != "STOP" {
		t.Errorf("event %s", e)
	}
	var refused *qmpError
	if err := c.call(t.Context(), "refuse", nil, nil); !errors.As(err, &refused) || refused.Desc != "no" {
		t.Errorf("a refusal is %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.call(ctx, "hang", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a call without an answer: %v", err)
	}
	theirs.Close()
	if e := <-events; e != eventGone {
		t.Errorf("event %s", e)
	}
	if err := c.call(t.Context(), "late", nil, nil); !errors.Is(err, errGone) {
		t.Errorf("a call to nobody: %v", err)
	}
}

// pending is how many calls wait for their answer.
func (c *client) pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}

// pair returns two ends of a unix socket.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func FuzzMessage(f *testing.F) {
	for _, s := range []string{
		`{"QMP": {"version": {}, "capabilities": ["oob"]}}`, `{"return": {}, "id": 1}`, `{"error": {"class": "x", "desc": "y"}, "id": 2}`,
		`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`, `{}`, `[]`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		line, err := readLine(bufio.NewReader(bytes.NewReader(data)))
		if len(line) > maxMessage {
			t.Fatalf("a line of %d bytes, %v", len(line), err)
		}
		m, err := parseMessage(line)
		if err == nil && m.Event != "" {
			_ = shutdownReason(event{m.Event, m.Data, m.When.before(time.Now())})
		}
	})
}

func FuzzMapping(f *testing.F) {
	f.Add("7f0000000000-7f0010002000 rw-p 00000000 00:01 1234 /memfd:atoll-memory (deleted)")
	f.Add("7f0000000000-7f0000000000 rw-p 00000000 00:01 1234 /memfd:atoll-memory")
	f.Fuzz(func(t *testing.T, line string) {
		if a, ok := parseMapping(line); ok && a.address == 0 && a.pages == 0 {
			t.Fatalf("%q is %+v", line, a)
		}
	})
}

// The device may be there and answer, and no guest come up: what decides is
// whether a kernel boots.
func TestAnAcceleratorIsTriedByBootingAKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: control groups")
	}
	d, err := Open(t.Context(), "")
	if err != nil {
		t.Fatal(err) // scripts/deps installs QEMU
	}
	d.Emulate()
	groups, err := cgroup.Open("atoll-qemutest")
	if err != nil {
		t.Fatal(err)
	}
	defer groups.Close()
	group := groups.Group("probe")
	kernel := microvmtest.Kernel(t)
	if err := d.bootNothing(t.Context(), kernel.Vmlinux, group); err != nil {
		t.Errorf("a kernel boots by emulation, but: %v", err)
	}

	dir, err := os.MkdirTemp("", "qemu-") // all directories above are open to nobody, as whom QEMU runs
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	hangs := filepath.Join(dir, "qemu")
	if err := os.WriteFile(hangs, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lying := &Driver{program: hangs, version: "7.2.0", accel: acceleration{kvm: true}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := lying.bootNothing(ctx, kernel.Vmlinux, group); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a machine that hangs is taken for one that boots: %v", err)
	}

	// What was found out is kept until the host boots again.
	file := filepath.Join(t.TempDir(), "accelerator.json")
	for range 2 {
		why, err := d.Accelerate(t.Context(), file, kernel.Vmlinux, group)
		if err != nil {
			t.Fatal(err)
		}
		if (why == "") != (d.Accelerator() == "kvm") {
			t.Errorf("accelerator %s, reason %q", d.Accelerator(), why)
		}
		v, err := readVerdict(file)
		if err != nil || v.Reason != why || v.TSCKHz == 0 {
			t.Errorf("kept is %+v, %v", v, err)
		}
	}
}

func TestAnEventIsAsOldAsQEMUSays(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for m, want := range map[moment]time.Duration{
		{999_999, 990_000}: -10 * time.Millisecond, {}: 0, {-1, -1}: 0,
		{1_000_001, 0}: 0, // the clock was set
		{900_000, 0}:   0,
	} {
		if got := m.before(now).Sub(now); got != want {
			t.Errorf("%+v: %v, not %v", m, got, want)
		}
	}
}
