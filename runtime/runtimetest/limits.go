package runtimetest

import (
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

var limitTests = []test{
	{"memory is limited", func(c sandbox.Capabilities) bool { return c.MemLimit }, testMemoryLimit},
	{"disk is limited", func(c sandbox.Capabilities) bool { return c.DiskLimit }, testDiskLimit},
	{"processes are limited", func(c sandbox.Capabilities) bool { return c.PidsLimit }, testPidsLimit},
	{"a fork bomb harms nobody else", func(c sandbox.Capabilities) bool { return c.PidsLimit }, testForkBomb},
	{"CPU is limited", func(c sandbox.Capabilities) bool { return c.CPULimit }, testCPULimit},
	{"network traffic is limited", canNetwork, testRateLimit},
}

// testMemoryLimit lets a command take more than the limit. The command may be
// killed or the whole sandbox may die, but the host never gives more, and a
// dead sandbox says why.
func testMemoryLimit(t *testing.T, s *suite) {
	const limit, slack = 160 << 20, 64 << 20 // bytes
	events := s.Runtime.Watch(deadline(t))
	b := s.create(t, func(spec *sandbox.Spec) { spec.Resources.Memory = limit })

	// tail keeps its last line, and there is only one.
	done := make(chan output, 1)
	go func() { done <- b.try("head -c 1000000000 /dev/zero | tail -n 1 | wc -c") }()
	var peak int64
	var out output
	for running := true; running; {
		select {
		case out = <-done:
			running = false
		case <-time.After(20 * time.Millisecond):
			if st, err := s.Runtime.Stats(deadline(t), b.id); err == nil {
				peak = max(peak, st.Memory)
			}
		}
	}
	if strings.TrimSpace(out.Stdout) == "1000000000" {
		t.Errorf("a command held 1 GB under a limit of %d MiB", limit>>20)
	}
	if peak > limit+slack {
		t.Errorf("the sandbox took %d MiB, its limit is %d MiB", peak>>20, limit>>20)
	}
	st, ok := s.status(t, b.id)
	switch {
	case ok && st.State == sandbox.Running:
		b.must("echo alive")
	case ok && st.State == sandbox.Error:
		waitEvent(t, events, b.id, func(e sandbox.Event) bool { return strings.Contains(e.Reason, "memory") })
	default:
		t.Errorf("out of memory made the sandbox %+v (listed: %v)", st, ok)
	}
}

func testDiskLimit(t *testing.T, s *suite) {
	const limit, slack = 48 << 20, 8 << 20 // bytes
	b := s.create(t, func(spec *sandbox.Spec) { spec.Resources.Disk = limit })
	if out := b.sh("dd if=/dev/zero of=big bs=1M count=96"); out.Exit == 0 {
		t.Errorf("96 MiB were written under a limit of %d MiB", limit>>20)
	}
	st := b.stats()
	if st.Disk > limit+slack {
		t.Errorf("%d MiB are on disk, the limit is %d MiB", st.Disk>>20, limit>>20)
	}
	if st.DiskLimit != limit {
		t.Errorf("stats report a limit of %d, want %d", st.DiskLimit, limit)
	}
	b.must("rm big; echo room again > small; cat small")
}

// spawnAll starts 600 processes, or as many as it can.
const spawnAll = `i=0; while [ $i -lt 600 ]; do sleep 300 >/dev/null 2>&1 </dev/null & i=$((i+1)); done`

func testPidsLimit(t *testing.T, s *suite) {
	const limit = 128
	b := s.create(t, func(spec *sandbox.Spec) { spec.Resources.Pids = limit })
	b.try(spawnAll)
	st, err := s.Runtime.Stats(deadline(t), b.id)
	if err == nil && (st.Pids > limit || st.Pids < limit/4) {
		t.Errorf("%d processes run, want close to the limit of %d", st.Pids, limit)
	}
	// A sandbox full of processes still goes without a trace.
	if err := s.Runtime.Destroy(deadline(t), b.id); err != nil {
		t.Fatalf("Destroy: %v", err)
	}
	s.wantGone(t, b.id)
}

// testForkBomb lets a sandbox without a limit of its own fork without end. It
// may starve itself, so nothing is asked of it any more.
func testForkBomb(t *testing.T, s *suite) {
	bomb := s.create(t, func(spec *sandbox.Spec) {
		spec.Resources.Pids = 0
		if s.caps.CPULimit {
			spec.Resources.CPUs = 0.5 // mercy for the tests of others
		}
	})
	bomb.write("bomb", []byte("f() { f | f & f; }; f"))
	go bomb.try("setsid sh ./bomb >/dev/null 2>&1 </dev/null &")
	for range 10 {
		time.Sleep(100 * time.Millisecond)
		if st, err := s.Runtime.Stats(deadline(t), bomb.id); err == nil && st.Pids > 8192 {
			t.Fatalf("a fork bomb has %d processes by default", st.Pids)
		}
	}
	other := s.create(t)
	if got := other.must("echo fine"); got != "fine\n" {
		t.Errorf("beside a fork bomb another sandbox says %q", got)
	}
	if err := s.Runtime.Destroy(deadline(t), bomb.id); err != nil {
		t.Fatalf("Destroy: %v", err)
	}
	s.wantGone(t, bomb.id)
	other.must("true")
}

func testCPULimit(t *testing.T, s *suite) {
	const cores = 0.5
	b := s.create(t, func(spec *sandbox.Spec) { spec.Resources.CPUs = cores })
	b.must("setsid sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null & setsid sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null &")
	start, before := time.Now(), b.stats()
	time.Sleep(2 * time.Second)
	used, wall := b.stats().CPU-before.CPU, time.Since(start)
	// Only the upper bound is certain: a loaded machine gives less. A quota is
	// given in periods of 100 ms, hence the slack.
	if allowed := time.Duration(cores*float64(wall)) + 300*time.Millisecond; used > allowed {
		t.Errorf("two busy loops used %v of CPU in %v, allowed are %v", used, wall, allowed)
	}
}
