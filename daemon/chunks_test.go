package daemon

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: W4
func TestTheCacheThatANodeIsGivenIsReadThroughAndCounted(t *testing.T) {
	p := &Parts{Home: Home(t.TempDir())}
	c, err := p.openCache(Config{Cache: Cache{Memory: 1 << 20, Disk: 1 << 20}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.closeAll() }()
	data := []byte("a chunk")
	for range 3 {
		if _, err := c.Get(t.Context(), chunk.Sum(data), func(context.Context, chunk.ID) ([]byte, error) { return data, nil }); err != nil {
			t.Fatal(err)
		}
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(newChunkMetrics(c, carry.New(carry.Config{Log: slog.New(slog.DiscardHandler)})))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[f.GetName()+" "+m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"atoll_chunk_cache_hits_total memory": 2, "atoll_chunk_cache_misses_total memory": 1, "atoll_chunk_cache_misses_total disk": 1,
		"atoll_chunk_cache_hits_total origin": 1, "atoll_chunk_cache_hit_bytes_total memory": 14, "atoll_chunk_fetched_total global": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
}

func TestACacheOrStoreThatMakesNoSenseIsRefused(t *testing.T) {
	p := &Parts{Home: Home(t.TempDir())}
	defer func() { _ = p.closeAll() }()
	if _, err := p.openCache(Config{Cache: Cache{Redis: "nonsense"}}); !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(sandbox.HintOf(err), "redis://") {
		t.Errorf("a Redis: %v", err)
	}
	if _, err := p.openStore(Config{Store: "nonsense://x"}); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a store: %v", err)
	}
}
