package cache_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/sandbox"
)

var (
	ctx    = context.Background()
	silent = slog.New(slog.DiscardHandler)
)

func content(i int) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint32(nil, uint32(i)), 16<<10) // 64 KB
}

// origin has the chunks 0 to 99 and counts how often it is asked.
type origin struct {
	asked atomic.Int64
	all   map[chunk.ID][]byte
}

func newOrigin() *origin {
	o := &origin{all: make(map[chunk.ID][]byte)}
	for i := range 100 {
		o.all[chunk.Sum(content(i))] = content(i)
	}
	return o
}

func (o *origin) get(_ context.Context, id chunk.ID) ([]byte, error) {
	o.asked.Add(1)
	if data, ok := o.all[id]; ok {
		return data, nil
	}
	return nil, sandbox.Errorf("origin", sandbox.NotFound, id.String(), "no such chunk")
}

// reader reads through a cache from one origin.
type reader struct {
	*cache.Cache
	origin cache.Origin
}

func over(o cache.Origin, tiers ...cache.Tier) *reader { return &reader{cache.New(tiers...), o} }

func (r *reader) Get(ctx context.Context, id chunk.ID) ([]byte, error) {
	return r.Cache.Get(ctx, id, r.origin)
}

func memory(t testing.TB, limit int64) *cache.Memory {
	t.Helper()
	m, err := cache.NewMemory(limit)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func disk(t testing.TB, dir string, limit int64) (*cache.Disk, *chunk.Disk) {
	t.Helper()
	s, err := chunk.OpenDisk(dir, chunk.DiskOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	d, err := cache.NewDisk(ctx, s, limit, silent)
	if err != nil {
		t.Fatal(err)
	}
	return d, s
}

func read(t testing.TB, c *reader, i int) {
	t.Helper()
	got, err := c.Get(ctx, chunk.Sum(content(i)))
	if err != nil || !bytes.Equal(got, content(i)) {
		t.Fatalf("chunk %d: %v", i, err)
	}
}

func hits(c *reader) (n []int64) {
	for _, s := range c.Stats() {
		n = append(n, s.Hits)
	}
	return n
}

// conformance: W4
func TestAChunkIsFoundInTheNearestTierAndPromoted(t *testing.T) {
	srv := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	defer client.Close()
	o := newOrigin()
	shared := cache.NewRedis(client, time.Hour, silent)
	d, _ := disk(t, t.TempDir(), 64<<20)
	one := over(o.get, memory(t, 64<<20), shared, d)
	read(t, one, 1)
	read(t, one, 1)
	if h := hits(one); h[0] != 1 || h[1] != 0 || h[2] != 0 || h[3] != 1 {
		t.Errorf("hits %v", h)
	}
	// Another process with the same disk, another node with the same Redis.
	again := over(o.get, memory(t, 64<<20), d)
	read(t, again, 1)
	read(t, again, 1)
	near := over(o.get, memory(t, 64<<20), shared)
	read(t, near, 1)
	read(t, near, 1)
	for _, h := range [][]int64{hits(again), hits(near)} {
		if h[0] != 1 || h[1] != 1 || h[2] != 0 {
			t.Errorf("hits %v", h)
		}
	}
	if n := o.asked.Load(); n != 1 {
		t.Errorf("the origin was asked %d times", n)
	}
	s := one.Stats()
	if s[0].Tier != "memory" || s[1].Tier != "redis" || s[2].Tier != "disk" || s[3].Tier != "origin" || s[0].Bytes != 64<<10 || s[0].Misses != 1 {
		t.Errorf("stats %+v", s)
	}
}

// conformance: W4
func TestTiersStayWithinTheirLimitsAndTheOriginIsAskedAgain(t *testing.T) {
	o := newOrigin()
	d, store := disk(t, t.TempDir(), 1<<20)
	c := over(o.get, memory(t, 256<<10), d)
	for i := range 100 {
		read(t, c, i)
	}
	deadline := time.Now().Add(20 * time.Second) // eviction is another goroutine's
	for store.Used() > 1<<20+8*(64<<10) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if used := store.Used(); used > 1<<20+8*(64<<10) {
		t.Errorf("%d bytes on disk", used)
	}
	for i := range 100 {
		read(t, c, i)
	}
	if n := o.asked.Load(); n < 150 || n > 200 {
		t.Errorf("the origin was asked %d times", n)
	}
}

func TestADamagedCopyIsNotUsed(t *testing.T) {
	srv := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	defer client.Close()
	id := chunk.Sum(content(1))
	if err := srv.Set("atoll:chunk:"+id.String(), "something else"); err != nil {
		t.Fatal(err)
	}
	c := over(newOrigin().get, cache.NewRedis(client, time.Hour, silent))
	read(t, c, 1)
	read(t, c, 1)
	if h := hits(c); h[0] != 1 {
		t.Errorf("hits %v: the damaged copy was not replaced", h)
	}
	lying := over(func(context.Context, chunk.ID) ([]byte, error) { return []byte("lie"), nil }, memory(t, 1<<20))
	for range 2 {
		if _, err := lying.Get(ctx, id); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("a lie is believed: %v", err)
		}
	}
}

func TestATierThatIsGoneHasNothing(t *testing.T) {
	srv := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: srv.Addr(), MaxRetries: -1})
	defer client.Close()
	c := over(newOrigin().get, cache.NewRedis(client, time.Hour, silent))
	srv.Close()
	read(t, c, 1)
	if _, err := c.Get(ctx, chunk.ID{1}); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("what the origin says is lost: %v", err)
	}
}

func TestReadersOfOneChunkShareOneFetch(t *testing.T) {
	o := newOrigin()
	begun, release := make(chan struct{}, 100), make(chan struct{})
	c := over(func(ctx context.Context, id chunk.ID) ([]byte, error) {
		begun <- struct{}{}
		<-release
		return o.get(ctx, id)
	}, memory(t, 1<<20))
	first, leave := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = c.Get(first, chunk.Sum(content(1))) })
	<-begun
	leave() // the fetch goes on for the others
	for range 10 {
		wg.Go(func() { read(t, c, 1) })
	}
	close(release)
	wg.Wait()
	if n := o.asked.Load(); n != 1 {
		t.Errorf("the origin was asked %d times", n)
	}
}

func BenchmarkMemoryHit(b *testing.B) {
	c := over(newOrigin().get, memory(b, 64<<20))
	read(b, c, 1)
	id := chunk.Sum(content(1))
	for b.Loop() {
		if _, err := c.Get(ctx, id); err != nil {
			b.Fatal(err)
		}
	}
}

// conformance: W4
func TestAMemoryHitIsMeasured(t *testing.T) {
	c := over(newOrigin().get, memory(t, 64<<20))
	const n = 100_000
	read(t, c, 1)
	before := c.Stats()[0]
	id := chunk.Sum(content(1))
	for range n {
		if _, err := c.Get(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	after := c.Stats()[0]
	if after.Hits-before.Hits != n {
		t.Errorf("%d hits of %d", after.Hits-before.Hits, n)
	}
	t.Logf("measured: W4 hit in memory: %v", (after.Time-before.Time)/n)
}
