package gvisor_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/sandbox"
)

// measured collects durations and reports their median and 95th percentile.
type measured []time.Duration

func (m *measured) time(f func()) {
	start := time.Now()
	f()
	*m = append(*m, time.Since(start))
}

func (m measured) report(b *testing.B) {
	slices.Sort(m)
	ms := func(q float64) float64 { return float64(m[int(q*float64(len(m)-1)+0.5)].Microseconds()) / 1000 }
	b.ReportMetric(ms(0.5), "p50_ms")
	b.ReportMetric(ms(0.95), "p95_ms")
	b.ReportMetric(0, "ns/op")
}

// used sums the processor time of sandboxes since their boot, which says more
// than the clock on a machine that does other things too.
type used struct {
	sum time.Duration
	n   int
}

func (u *used) add(b *testing.B, r *gvisor.Runtime, id string) {
	st, err := r.Stats(b.Context(), id)
	must(b, err)
	u.sum, u.n = u.sum+st.CPU, u.n+1
}

func (u *used) report(b *testing.B) {
	b.ReportMetric(float64(u.sum.Microseconds())/1000/float64(u.n), "cpu_ms")
}

func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// bench is a runtime with one running sandbox and a snapshot of it.
func bench(b *testing.B, edits ...func(*gvisor.Config)) (r *gvisor.Runtime, spec sandbox.Spec, state string) {
	r = open(b, b.TempDir(), edits...)
	b.Cleanup(func() {
		all, _ := r.List(context.Background())
		for _, st := range all {
			must(b, r.Destroy(context.Background(), st.ID))
		}
		must(b, r.Close())
	})
	spec = erofsSpec(b, "parent")
	must(b, r.Create(b.Context(), spec))
	state = b.TempDir()
	must(b, r.Snapshot(b.Context(), spec.ID, state, sandbox.SnapshotOptions{}))
	return r, spec, state
}

func BenchmarkCreate(b *testing.B) {
	r, spec, _ := bench(b)
	var m measured
	var cpu used
	for i := range b.N {
		spec.ID = "b" + strconv.Itoa(i)
		m.time(func() { must(b, r.Create(b.Context(), spec)) })
		cpu.add(b, r, spec.ID)
		must(b, r.Destroy(b.Context(), spec.ID))
	}
	m.report(b)
	cpu.report(b)
}

func BenchmarkSnapshot(b *testing.B) {
	r, spec, _ := bench(b)
	var m measured
	for range b.N {
		dir := b.TempDir()
		m.time(func() { must(b, r.Snapshot(b.Context(), spec.ID, dir, sandbox.SnapshotOptions{})) })
	}
	m.report(b)
}

func BenchmarkRestore(b *testing.B) {
	for _, prewarm := range []int{0, 1} {
		b.Run(fmt.Sprintf("prewarm=%d", prewarm), func(b *testing.B) {
			r, spec, state := bench(b, func(c *gvisor.Config) { c.Prewarm = prewarm })
			var m measured
			var cpu used
			for i := range b.N {
				spec.ID = "b" + strconv.Itoa(i)
				time.Sleep(time.Duration(prewarm) * 200 * time.Millisecond) // let the pool fill
				m.time(func() { must(b, r.Restore(b.Context(), spec, state)) })
				cpu.add(b, r, spec.ID)
				must(b, r.Destroy(b.Context(), spec.ID))
			}
			m.report(b)
			cpu.report(b)
		})
	}
}

func BenchmarkForkTen(b *testing.B) {
	r, spec, _ := bench(b)
	var m measured
	for i := range b.N {
		dir := b.TempDir()
		m.time(func() {
			must(b, r.Snapshot(b.Context(), "parent", dir, sandbox.SnapshotOptions{}))
			var wg sync.WaitGroup
			for k := range 10 {
				wg.Go(func() {
					s := spec
					s.ID = fmt.Sprintf("b%dx%d", i, k)
					if err := r.Restore(b.Context(), s, dir); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
		})
		for k := range 10 {
			must(b, r.Destroy(b.Context(), fmt.Sprintf("b%dx%d", i, k)))
		}
	}
	m.report(b)
}

// BenchmarkDial measures one connection, and the way back and forth on it.
func BenchmarkDial(b *testing.B) {
	r, spec, _ := bench(b)
	var dial, ask measured
	for range b.N {
		dial.time(func() {
			conn, err := r.Dial(b.Context(), spec.ID, sandbox.GuestPort)
			must(b, err)
			defer conn.Close()
			ask.time(func() {
				_, err := conn.Write([]byte("GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
				must(b, err)
				_, err = conn.Read(make([]byte, 512))
				must(b, err)
			})
		})
	}
	ask.report(b)
	dial.report(b)
}

// BenchmarkIdleMemory measures what one idle sandbox takes of the host.
func BenchmarkIdleMemory(b *testing.B) {
	const n = 20
	r, spec, _ := bench(b)
	available := func() int64 {
		data, err := os.ReadFile("/proc/meminfo")
		must(b, err)
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); f[0] == "MemAvailable:" {
				kb, _ := strconv.ParseInt(f[1], 10, 64)
				return kb
			}
		}
		return 0
	}
	before := available()
	for i := range n {
		spec.ID = "i" + strconv.Itoa(i)
		must(b, r.Create(b.Context(), spec))
	}
	b.ReportMetric(float64(before-available())/1024/n, "MB/sandbox")
}

// BenchmarkTransfer measures how fast a file comes out of a sandbox.
func BenchmarkTransfer(b *testing.B) {
	const size = 64 << 20
	r, spec, _ := bench(b)
	sh(b, r, spec.ID, "head -c "+strconv.Itoa(size)+" /dev/zero > /big")
	b.SetBytes(size)
	for b.Loop() {
		f, err := agent(r, spec.ID).ReadFile(b.Context(), "/big")
		must(b, err)
		n, err := io.Copy(io.Discard, f)
		must(b, err)
		if n != size {
			b.Fatalf("%d bytes came, want %d", n, size)
		}
		f.Close()
	}
}

// BenchmarkExec measures a command in a running sandbox, from the call to its end.
func BenchmarkExec(b *testing.B) {
	r, spec, _ := bench(b)
	client := agent(r, spec.ID)
	var m measured
	for range b.N {
		m.time(func() {
			_, err := client.Run(b.Context(), guest.Command{Args: []string{"/bin/echo", "hi"}})
			must(b, err)
		})
	}
	m.report(b)
}
