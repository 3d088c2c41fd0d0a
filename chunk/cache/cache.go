// Package cache keeps copies of chunks near: in memory, in Redis if there is one, on disk, and behind them the origin, which
// is another node or an object store.
//
// A chunk that is found in one tier is promoted to those before it, and each tier decides by itself what it admits and what
// has to go. A tier never fails a read: one that is broken has nothing.
package cache

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/chunk"
)

// Tier keeps copies of chunks as long as it likes. Its methods may be called from many goroutines.
type Tier interface {
	Name() string
	// Get returns the chunk's content, which nobody changes, and compared with its name unless it never left this process.
	Get(ctx context.Context, id chunk.ID) ([]byte, bool)
	// Put offers a chunk, whose content nobody changes.
	Put(ctx context.Context, id chunk.ID, data []byte)
}

// Origin is where a chunk comes from that no tier has. What it returns is compared with the name.
type Origin func(ctx context.Context, id chunk.ID) ([]byte, error)

// Cache reads chunks through its tiers. It is safe for use by several goroutines.
type Cache struct {
	tiers  []Tier
	counts []counts // of each tier; the last is the origin's

	mu      sync.Mutex
	flights map[chunk.ID]*flight // fetches under way: several readers of one chunk wait for one fetch
}

type flight struct {
	done chan struct{} // closed when the rest is there
	data []byte
	err  error
}

type counts struct{ hits, misses, bytes, nanoseconds atomic.Int64 }

// New returns a cache; tiers come nearest first.
func New(tiers ...Tier) *Cache {
	return &Cache{tiers: tiers, counts: make([]counts, len(tiers)+1), flights: make(map[chunk.ID]*flight)}
}

// Get returns a chunk's content, which the caller must not change. origin is asked when no tier has it, once for all who want
// it at the time.
func (c *Cache) Get(ctx context.Context, id chunk.ID, origin Origin) ([]byte, error) {
	if len(c.tiers) > 0 { // the first tier is asked without waiting for anyone
		if data, ok := c.ask(ctx, 0, id); ok {
			return data, nil
		}
	}
	c.mu.Lock()
	f, waiting := c.flights[id]
	if !waiting {
		f = &flight{done: make(chan struct{})}
		c.flights[id] = f
	}
	c.mu.Unlock()
	if waiting {
		select {
		case <-f.done:
			return f.data, f.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	// Others may wait for this fetch: it ends when it ends, not when the first reader goes.
	f.data, f.err = c.fetch(context.WithoutCancel(ctx), id, origin)
	c.mu.Lock()
	delete(c.flights, id)
	c.mu.Unlock()
	close(f.done)
	return f.data, f.err
}

// fetch asks the tiers behind the first, then the origin, and promotes what it finds.
func (c *Cache) fetch(ctx context.Context, id chunk.ID, from Origin) ([]byte, error) {
	for i := 1; i < len(c.tiers); i++ {
		if data, ok := c.ask(ctx, i, id); ok {
			c.promote(ctx, i, id, data)
			return data, nil
		}
	}
	origin := &c.counts[len(c.tiers)]
	began := time.Now()
	data, err := from(ctx, id)
	if err == nil {
		err = verify(id, data)
	}
	origin.nanoseconds.Add(int64(time.Since(began)))
	if err != nil {
		origin.misses.Add(1)
		return nil, err
	}
	origin.hits.Add(1)
	origin.bytes.Add(int64(len(data)))
	c.promote(ctx, len(c.tiers), id, data)
	return data, nil
}

func (c *Cache) ask(ctx context.Context, i int, id chunk.ID) ([]byte, bool) {
	n := &c.counts[i]
	began := time.Now()
	data, ok := c.tiers[i].Get(ctx, id)
	n.nanoseconds.Add(int64(time.Since(began)))
	if !ok {
		n.misses.Add(1)
		return nil, false
	}
	n.hits.Add(1)
	n.bytes.Add(int64(len(data)))
	return data, true
}

// promote offers a chunk to all tiers before the one that it was found in.
func (c *Cache) promote(ctx context.Context, found int, id chunk.ID, data []byte) {
	for _, t := range c.tiers[:found] {
		t.Put(ctx, id, data)
	}
}

// Stats is what one tier did.
type Stats struct {
	Tier         string
	Hits, Misses int64         // of the origin: chunks that it gave, and failures
	Bytes        int64         // of the hits
	Time         time.Duration // spent asking
}

// Stats returns what each tier did since the cache was made, and the origin, which comes last.
func (c *Cache) Stats() []Stats {
	out := make([]Stats, len(c.counts))
	for i := range c.counts {
		n := &c.counts[i]
		out[i] = Stats{"origin", n.hits.Load(), n.misses.Load(), n.bytes.Load(), time.Duration(n.nanoseconds.Load())}
		if i < len(c.tiers) {
			out[i].Tier = c.tiers[i].Name()
		}
	}
	return out
}
