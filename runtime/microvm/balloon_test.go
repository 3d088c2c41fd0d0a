package microvm_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR2.5 FR5.3
func TestWhatAnIdleGuestHoldsOfItsFilesGoesToAHostThatLacksMemory(t *testing.T) {
	t.Parallel()
	r, s := start(t, func(c *microvm.Config) { c.Defaults.Memory = 320 << 20 })
	pid := r.MonitorPID(s.ID)
	guest := func() int64 { return private(t, pid)["guest memory"] }
	before := memoryDigest(t, pid)
	size, err := r.Given(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	want := sh(t, r, s.ID, "head -c 120000000 /dev/urandom > /file; sync; sha256sum /file")
	full := guest()
	if full < 120e6 {
		t.Fatalf("a guest that has 120 MB of files in its memory has %d MB of the host's", full/1e6)
	}
	const total = 8 << 30
	lacking := func() { r.ShareMemory(t.Context(), total, total/100) }
	await(t, "the guest gives", func() bool { lacking(); return guest() < full-60e6 })
	t.Logf("measured: FR2.5 of an idle guest with 120 MB of files in its memory the host holds %d MB, and %d MB when it lacks memory", full/1e6, guest()/1e6)
	if got := memoryDigest(t, pid); got != before {
		t.Error("the template's memory changed")
	}
	// It takes what it needs at once, without anybody's leave.
	if got := strings.TrimSpace(sh(t, r, s.ID, "head -c 180000000 /dev/zero | tail -n 1 | wc -c")); got != "180000000" {
		t.Errorf("a guest that gave memory back cannot take it again: %q", got)
	}
	r.ShareMemory(t.Context(), total, total/2)
	await(t, "the guest has its memory back", func() bool { got, err := r.Given(t.Context(), s.ID); return err == nil && got == size })
	if got := sh(t, r, s.ID, "sha256sum /file"); got != want {
		t.Errorf("the file is %q, was %q", got, want)
	}
}

// await waits until something is so.
func await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !so(); time.Sleep(time.Second) {
		if time.Now().After(end) {
			t.Fatalf("two minutes later it is not so that %s", what)
		}
	}
}

// conformance: FR2.5 FR2.6
func TestAMonitorThatIsKilledForWantOfMemoryIsToldApart(t *testing.T) {
	t.Parallel()
	r, s := start(t)
	events := r.Watch(t.Context())
	pid := r.MonitorPID(s.ID)
	// Its control group gets less than it needs, as a host that has no more would give.
	limit := groupFile(t, pid, "memory.limit_in_bytes", "memory.max")
	held := private(t, pid)
	if err := os.WriteFile(limit, []byte(strconv.FormatInt(sum(held)+48<<20, 10)), 0); err != nil {
		t.Fatal(err)
	}
	_, _ = run(t.Context(), r, s.ID, "head -c 100000000 /dev/zero | tail -n 1 | wc -c") // no answer is expected
	if reason := awaitError(t, r, s.ID); !strings.Contains(reason, "out of memory") {
		t.Errorf("the reason is %q", reason)
	}
	for e := range events {
		if e.Kind == sandbox.EventResource {
			if e.Sandbox != s.ID || !strings.Contains(e.Reason, "out of memory") {
				t.Errorf("the event is %+v", e)
			}
			return
		}
	}
}

// conformance: FR2.5
func TestAGuestMayUseAllOfItsMemory(t *testing.T) {
	t.Parallel()
	r, s := start(t, func(c *microvm.Config) { c.Defaults.Memory = 320 << 20 })
	for range 2 { // what was given back to the host can be had again
		if got := strings.TrimSpace(sh(t, r, s.ID, "head -c 230000000 /dev/zero | tail -n 1 | wc -c")); got != "230000000" {
			t.Errorf("a guest of 320 MiB cannot use 230 MB: %q", got)
		}
	}
}

// groupFile is a file of the control group of a process that bounds its memory.
func groupFile(t *testing.T, pid int, v1, v2 string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		file := ""
		switch controllers {
		case "memory":
			file = filepath.Join("/sys/fs/cgroup/memory", path, v1)
		case "":
			file = filepath.Join("/sys/fs/cgroup", path, v2)
		}
		if _, err := os.Stat(file); err == nil && file != "" {
			return file
		}
	}
	t.Fatalf("the monitor is in no group that bounds memory: %s", text)
	return ""
}
