package daemon

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/bucket"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/sandbox"
)

// Cache says where chunks that are fetched are kept.
type Cache struct {
	Memory int64  // bytes; 0: none
	Disk   int64  // bytes; 0: none
	Redis  string // URL of one that nodes of a region share; empty: none
}

// DefaultCache is what a node has unless it is told otherwise.
var DefaultCache = Cache{Memory: 256 << 20, Disk: 4 << 30}

const (
	redisLife = 24 * time.Hour // of a chunk that nobody uses
	// diskSpeed and storeSpeed are what packing competes with, in bytes per second.
	diskSpeed  = 1e9
	storeSpeed = 25e6
)

// planFor packs what pays at a speed, by what the content is.
func planFor(speed float64) func([]byte) pack.Plan {
	return func(data []byte) pack.Plan {
		return pack.Choose(pack.Look(data), pack.Link{Bandwidth: speed}, pack.CPU{Cores: 1})
	}
}

// openCache opens the tiers in which chunks are kept.
func (p *Parts) openCache(cfg Config) (*cache.Cache, error) {
	var tiers []cache.Tier
	if cfg.Cache.Memory > 0 {
		m, err := cache.NewMemory(cfg.Cache.Memory)
		if err != nil {
			return nil, err
		}
		tiers = append(tiers, m)
	}
	if cfg.Cache.Redis != "" {
		o, err := redis.ParseURL(cfg.Cache.Redis)
		if err != nil {
			return nil, sandbox.E("daemon.Cache", sandbox.Invalid, "--cache-redis", err).WithHint("write redis://HOST:6379")
		}
		client := redis.NewClient(o)
		p.closers = append(p.closers, client)
		tiers = append(tiers, cache.NewRedis(client, redisLife, cfg.Log))
	}
	if cfg.Cache.Disk > 0 {
		store, err := chunk.OpenDisk(p.Home.path("chunk-cache"), chunk.DiskOptions{Plan: planFor(diskSpeed)})
		if err != nil {
			return nil, err
		}
		p.closers = append(p.closers, store)
		d, err := cache.NewDisk(context.Background(), store, cfg.Cache.Disk, cfg.Log)
		if err != nil {
			return nil, err
		}
		tiers = append(tiers, d)
	}
	return cache.New(tiers...), nil
}

// openStore opens the object store, if there is one.
func (p *Parts) openStore(cfg Config) (*bucket.Bucket, error) {
	if cfg.Store == "" {
		return nil, nil
	}
	b, err := bucket.Open(context.Background(), cfg.Store, bucket.Options{Plan: planFor(storeSpeed)})
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, b)
	return b, nil
}

// chunkMetrics are about chunks that are fetched: from which tier of the cache, and from how far.
type chunkMetrics struct {
	cache   *cache.Cache
	carrier *carry.Carrier

	hits, misses, bytes, seconds, fetched, fetchedBytes *prometheus.Desc
}

// chunkMetrics returns those of this node; nil before it has peers.
func (p *Parts) chunkMetrics() prometheus.Collector {
	if p.peers.Carrier == nil {
		return nil
	}
	return newChunkMetrics(p.cache, p.peers.Carrier)
}

func newChunkMetrics(c *cache.Cache, carrier *carry.Carrier) *chunkMetrics {
	tier, from := []string{"tier"}, []string{"from"}
	return &chunkMetrics{
		cache: c, carrier: carrier,
		hits:         prometheus.NewDesc("atoll_chunk_cache_hits_total", "Chunks found in a tier of the cache; origin: fetched.", tier, nil),
		misses:       prometheus.NewDesc("atoll_chunk_cache_misses_total", "Chunks not found in a tier; origin: failures.", tier, nil),
		bytes:        prometheus.NewDesc("atoll_chunk_cache_hit_bytes_total", "Bytes of the chunks found in a tier.", tier, nil),
		seconds:      prometheus.NewDesc("atoll_chunk_cache_seconds_total", "Time spent asking a tier.", tier, nil),
		fetched:      prometheus.NewDesc("atoll_chunk_fetched_total", "Chunks that came from nodes at a distance, or from the object store.", from, nil),
		fetchedBytes: prometheus.NewDesc("atoll_chunk_fetched_bytes_total", "Bytes of these, as they came.", from, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *chunkMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m *chunkMetrics) Collect(ch chan<- prometheus.Metric) {
	put := func(d *prometheus.Desc, v float64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, label)
	}
	for _, s := range m.cache.Stats() {
		put(m.hits, float64(s.Hits), s.Tier)
		put(m.misses, float64(s.Misses), s.Tier)
		put(m.bytes, float64(s.Bytes), s.Tier)
		put(m.seconds, s.Time.Seconds(), s.Tier)
	}
	for _, s := range m.carrier.Fetched() {
		put(m.fetched, float64(s.Chunks), s.From)
		put(m.fetchedBytes, float64(s.Bytes), s.From)
	}
}
