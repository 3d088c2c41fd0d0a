package network

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
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

// BenchmarkThroughput measures a stream from a sandbox to a server: directly
// through the kernel, and through the web proxy that reads its name first.
func BenchmarkThroughput(b *testing.B) {
	w := newWorld(b)
	z := w.serveNames(b)
	z.set("good.example", siteA)
	n := openNetwork(b, "bench", nil)
	var l net.Listener
	var err error
	within(b, w.ns, func() { l, err = net.Listen("tcp4", siteA+":443") })
	must(b, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}()
		}
	}()
	first := hello(b, &tls.Config{ServerName: "good.example"})
	block := make([]byte, 1<<20)
	for id, policy := range map[string]sandbox.NetworkPolicy{
		"direct":  open,
		"proxied": {AllowOut: []string{"good.example"}},
	} {
		b.Run(id, func(b *testing.B) {
			l, err := n.Attach(b.Context(), id, policy)
			must(b, err)
			defer func() { must(b, n.Detach(b.Context(), id)) }()
			c, err := dialFrom(b, l.NetNS, siteA+":443")
			must(b, err)
			defer c.Close()
			_, err = c.Write(first)
			must(b, err)
			b.SetBytes(int64(len(block)))
			for b.Loop() {
				_, err := c.Write(block)
				must(b, err)
			}
			must(b, c.(*net.TCPConn).CloseWrite())
			_, _ = c.Read(block) // until all has arrived
		})
	}
}
