package cache

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/redis/go-redis/v9"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// verify fails with Invalid unless data is the chunk.
func verify(id chunk.ID, data []byte) error {
	if got := chunk.Sum(data); got != id {
		return sandbox.Errorf("cache.Get", sandbox.Invalid, id.String(), "the content is that of %s", got)
	}
	return nil
}

// Memory is the tier in this process. What it admits and lets go is decided by W-TinyLFU: a chunk that is used once does not
// drive out one that is used often.
type Memory struct {
	cache *otter.Cache[chunk.ID, []byte]
}

// NewMemory returns a tier of at most limit bytes.
func NewMemory(limit int64) (*Memory, error) {
	c, err := otter.New(&otter.Options[chunk.ID, []byte]{
		MaximumWeight: uint64(max(limit, 1)),
		Weigher:       func(_ chunk.ID, data []byte) uint32 { return uint32(len(data)) }, // at most MaxSize
	})
	if err != nil {
		return nil, sandbox.E("cache.NewMemory", sandbox.Invalid, "", err)
	}
	return &Memory{c}, nil
}

// Name implements Tier.
func (m *Memory) Name() string { return "memory" }

// Get implements Tier.
func (m *Memory) Get(_ context.Context, id chunk.ID) ([]byte, bool) { return m.cache.GetIfPresent(id) }

// Put implements Tier.
func (m *Memory) Put(_ context.Context, id chunk.ID, data []byte) { m.cache.Set(id, data) }

// Redis is the tier that several nodes of a region share.
type Redis struct {
	client redis.UniversalClient
	life   time.Duration
	log    *slog.Logger
}

const (
	redisPrefix  = "atoll:chunk:"
	redisTimeout = 250 * time.Millisecond // slower than that, a disk is better
)

// NewRedis returns a tier in a Redis, which should evict by itself ("maxmemory-policy allkeys-lfu"). A chunk that is not used
// for life goes.
func NewRedis(client redis.UniversalClient, life time.Duration, log *slog.Logger) *Redis {
	return &Redis{client, life, log}
}

// Name implements Tier.
func (r *Redis) Name() string { return "redis" }

// Get implements Tier. Others write to a Redis too, so what it gives is compared with its name, and removed when it differs.
func (r *Redis) Get(ctx context.Context, id chunk.ID) ([]byte, bool) {
	ctx, stop := context.WithTimeout(ctx, redisTimeout)
	defer stop()
	key := redisPrefix + id.String()
	data, err := r.client.GetEx(ctx, key, r.life).Bytes()
	if err != nil {
		if !errors.Is(err, redis.Nil) {
			r.log.Debug("reading from redis", "error", err)
		}
		return nil, false
	}
	if err := verify(id, data); err != nil {
		r.log.Warn("redis holds a damaged chunk", "error", err)
		r.client.Del(ctx, key)
		return nil, false
	}
	return data, true
}

// Put implements Tier.
func (r *Redis) Put(ctx context.Context, id chunk.ID, data []byte) {
	ctx, stop := context.WithTimeout(ctx, redisTimeout)
	defer stop()
	if err := r.client.SetNX(ctx, redisPrefix+id.String(), data, r.life).Err(); err != nil {
		r.log.Debug("writing to redis", "error", err)
	}
}

// Disk is the tier in a store of its own.
type Disk struct {
	store *chunk.Disk
	order *otter.Cache[chunk.ID, int64] // what is there and its size; it decides what goes
	log   *slog.Logger
}

// NewDisk returns a tier of at most limit bytes of content in a store, which nothing else uses. What is in it stays.
func NewDisk(ctx context.Context, store *chunk.Disk, limit int64, log *slog.Logger) (*Disk, error) {
	d := &Disk{store: store, log: log}
	var err error
	d.order, err = otter.New(&otter.Options[chunk.ID, int64]{
		MaximumWeight: uint64(max(limit, 1)),
		Weigher:       func(_ chunk.ID, size int64) uint32 { return uint32(size) }, // at most MaxSize and a little
		OnAtomicDeletion: func(e otter.DeletionEvent[chunk.ID, int64]) {
			if !e.WasEvicted() {
				return
			}
			if err := store.Delete(context.Background(), e.Key); err != nil {
				log.Warn("removing a cached chunk", "error", err)
			}
		},
	})
	if err != nil {
		return nil, sandbox.E("cache.NewDisk", sandbox.Invalid, "", err)
	}
	return d, store.Each(ctx, func(e chunk.Entry) error {
		d.order.Set(e.ID, e.Size)
		return nil
	})
}

// Name implements Tier.
func (d *Disk) Name() string { return "disk" }

// Get implements Tier.
func (d *Disk) Get(ctx context.Context, id chunk.ID) ([]byte, bool) {
	if _, ok := d.order.GetIfPresent(id); !ok {
		return nil, false
	}
	data, err := d.store.Get(ctx, id)
	if err != nil {
		d.order.Invalidate(id)
		if !sandbox.Is(err, sandbox.NotFound) {
			d.log.Warn("reading a cached chunk", "error", err)
		}
		return nil, false
	}
	return data, true
}

// Put implements Tier.
func (d *Disk) Put(ctx context.Context, id chunk.ID, data []byte) {
	if _, err := d.store.Put(ctx, data); err != nil {
		d.log.Warn("caching a chunk", "error", err)
		return
	}
	d.order.Set(id, int64(len(data)))
}
