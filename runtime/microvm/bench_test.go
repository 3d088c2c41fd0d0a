package microvm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// report gives the median and the 95th percentile of times.
func report(b *testing.B, times []time.Duration) {
	b.Helper()
	slices.Sort(times)
	at := func(p float64) float64 {
		return float64(times[min(len(times)-1, int(p*float64(len(times))))].Microseconds()) / 1000
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.95), "p95-ms")
}

// BenchmarkStart measures from asking for a machine of 256 MiB to its guest's
// answer, for each way in which machines come to be.
func BenchmarkStart(b *testing.B) {
	for _, how := range []string{microvm.StartCold, microvm.StartTemplate, microvm.StartSpawned, microvm.StartPool} {
		b.Run(how, func(b *testing.B) {
			r := open(b, b.TempDir(), func(c *microvm.Config) {
				c.Defaults.Memory = 256 << 20
				if how == microvm.StartSpawned || how == microvm.StartPool {
					c.Prewarm = 1
				}
			})
			defer destroyAll(b, r)
			first := spec(b, "first") // makes the template
			if err := r.Create(b.Context(), first); err != nil {
				b.Fatal(err)
			}
			var times, work []time.Duration
			for i := 0; b.Loop(); i++ {
				s := spec(b, fmt.Sprintf("s%d", i))
				s.Labels = map[string]string{microvm.LabelStart: how}
				begin := time.Now()
				err := r.Create(b.Context(), s)
				for ; sandbox.Is(err, sandbox.Unavailable); err = r.Create(b.Context(), s) {
					time.Sleep(10 * time.Millisecond)
					begin = time.Now()
				}
				if err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(begin))
				work = append(work, processorTime(b, r.MonitorPID(s.ID)))
				if err := r.Destroy(b.Context(), s.ID); err != nil {
					b.Fatal(err)
				}
			}
			report(b, times)
			slices.Sort(work)
			b.ReportMetric(float64(work[len(work)/2].Microseconds())/1000, "cpu-ms")
		})
	}
}

// processorTime is what a process took of the processors since it began.
func processorTime(b *testing.B, pid int) (total time.Duration) {
	b.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			b.Fatal(err)
		}
		total += time.Duration(ns)
	}
	return total
}

// BenchmarkForkPause measures for how long a snapshot holds up an idle machine of
// 256 MiB.
func BenchmarkForkPause(b *testing.B) {
	r, s := start(b, func(c *microvm.Config) { c.Defaults.Memory = 256 << 20 })
	var paused time.Time
	var times []time.Duration
	r.OnStep(func(step string) {
		switch step {
		case "layer opened":
			paused = time.Now()
		case "resumed":
			times = append(times, time.Since(paused))
		}
	})
	for b.Loop() {
		if err := r.Snapshot(b.Context(), s.ID, b.TempDir(), sandbox.SnapshotOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	report(b, times)
}

// BenchmarkIdleMemory measures what one idle machine takes of its host.
func BenchmarkIdleMemory(b *testing.B) {
	r, s := start(b, func(c *microvm.Config) { c.Defaults.Memory = 256 << 20 })
	time.Sleep(2 * time.Second)
	var total int64
	n := 0
	for i := 0; b.Loop(); i++ {
		st, err := r.Stats(b.Context(), s.ID)
		if err != nil {
			b.Fatal(err)
		}
		total, n = total+st.Memory, n+1
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(total)/float64(n)/1e6, "MB")
}
