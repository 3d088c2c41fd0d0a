package network

import (
	"fmt"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// BenchmarkAttach measures attaching with a link at hand and with one to make,
// replacing a policy, and detaching.
func BenchmarkAttach(b *testing.B) {
	newWorld(b)
	for _, mode := range []struct {
		name    string
		prewarm int
	}{{"cold", 0}, {"prewarmed", 16}} {
		b.Run(mode.name, func(b *testing.B) {
			n := openNetwork(b, "bench", func(c *Config) { c.Prewarm = mode.prewarm })
			var update, detach time.Duration
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				for mode.prewarm > 0 && len(n.ready) == 0 {
					time.Sleep(time.Millisecond)
				}
				id := fmt.Sprint("s", i)
				b.StartTimer()
				_, err := n.Attach(b.Context(), id, sandbox.NetworkPolicy{Internet: true})
				b.StopTimer()
				must(b, err)
				start := time.Now()
				must(b, n.Update(b.Context(), id, sandbox.NetworkPolicy{Internet: true, DenyOut: []string{siteA}}))
				updated := time.Now()
				must(b, n.Detach(b.Context(), id))
				update, detach = update+updated.Sub(start), detach+time.Since(updated)
				b.StartTimer()
			}
			b.ReportMetric(float64(update.Microseconds())/float64(b.N)/1000, "update-ms")
			b.ReportMetric(float64(detach.Microseconds())/float64(b.N)/1000, "detach-ms")
		})
	}
}
