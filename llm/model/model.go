package model

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Model is a shard of a model in memory. Forward may be called from one goroutine
// at a time.
type Model struct {
	config     Config
	shard      Shard
	pool       *tensor.Pool
	exchange   ExchangeFunc
	tap        func(name string, x []float32, cols int)
	memory     *tensor.Memory
	bytes      int64 // of memory
	columnUnit int

	embedding tensor.Matrix
	layers    []layer
	norm      []float32
	head      tensor.Matrix
	steps     []Step
	state     state // buffers of a pass, kept between passes

	begun  time.Time
	took   time.Duration   // to load all; set before the last channel is closed
	loaded []chan struct{} // of each group, closed when it is there or never will be
	failed []error         // of each group, set before its channel is closed
	stop   context.CancelFunc
	loader sync.WaitGroup
}

// Options are what Open needs beside the source.
type Options struct {
	Shard    Shard        // the zero value is the whole model
	Pool     *tensor.Pool // computes; not closed by the model
	Exchange ExchangeFunc // nil when the shard has its layers for itself
	// Progress is told, by the goroutine that loads, how many of all bytes are
	// there. It may be nil.
	Progress func(done, all int64)
	// Tap is shown what goes into the linear parts of each layer, [tokens][cols], by
	// the name of the first tensor that takes it, e.g. "blk.3.attn_q.weight", as
	// quantisation wants to know. It must not keep x. It may be nil.
	Tap func(name string, x []float32, cols int)
}

// Weights is the memory that the weights of a shard will take, in bytes, known
// from the front of the file alone. It fails where Open would.
func Weights(src *Source, s Shard) (int64, error) {
	m, err := prepare(src, Options{Shard: s})
	if err != nil {
		return 0, err
	}
	return m.bytes, nil
}

// prepare checks everything that can be checked before weights are read.
func prepare(src *Source, o Options) (*Model, error) {
	c := src.Config()
	if o.Shard == (Shard{}) {
		o.Shard = c.Whole()
	}
	if err := o.Shard.check(&c); err != nil {
		return nil, err
	}
	m := &Model{config: c, shard: o.Shard, pool: o.Pool, exchange: o.Exchange, tap: o.Tap, columnUnit: columnUnit(src, o.Shard)}
	m.layers = make([]layer, o.Shard.Last-o.Shard.First)
	for _, g := range m.groups() {
		for i := range g {
			shape, ok, err := g[i].check(src)
			if err != nil {
				return nil, err
			}
			if !ok {
				continue
			}
			n, err := g[i].bytes(shape)
			if err != nil {
				return nil, err
			}
			m.bytes += int64(n)
		}
	}
	if m.shard.cut(c.FFN, m.columnUnit).len() == 0 || m.shard.vocabulary(&c).len() == 0 {
		return nil, sandbox.Errorf("model.Open", sandbox.Unsupported, "", "%d ranks for %d columns", o.Shard.Ranks, c.FFN)
	}
	return m, nil
}

// Open begins to load a model and returns at once: a pass waits for the layers
// that it has come to, so the first token may be computed while the last layers
// arrive. Wait tells when all are there. Open fails when the file cannot be a model
// or memory is missing.
func Open(src *Source, o Options) (*Model, error) {
	m, err := prepare(src, o)
	if err != nil {
		return nil, err
	}
	if m.memory, err = tensor.Alloc(int(m.bytes)); err != nil {
		return nil, sandbox.E("model.Open", sandbox.Exhausted, "", err)
	}
	groups := m.groups()
	m.loaded, m.failed = make([]chan struct{}, len(groups)), make([]error, len(groups))
	for i := range m.loaded {
		m.loaded[i] = make(chan struct{})
	}
	m.steps = m.graph()
	ctx, stop := context.WithCancel(context.Background())
	m.stop, m.begun = stop, time.Now()
	m.loader.Go(func() { m.load(ctx, src, groups, o.Progress) })
	return m, nil
}

// load reads all groups, in order, until ctx ends or one fails.
func (m *Model) load(ctx context.Context, src *Source, groups []group, progress func(done, all int64)) {
	memory, all := m.memory.Bytes(), m.bytes
	var done int64
	for i, g := range groups {
		// As they lie in the file, which may come over a network.
		slices.SortFunc(g, func(a, b want) int { return cmp.Compare(src.offset(a.name), src.offset(b.name)) })
		for j := range g {
			if err := ctx.Err(); err != nil {
				m.fail(i, sandbox.E("model.load", sandbox.Canceled, "", err))
				return
			}
			shape, ok, err := g[j].check(src)
			if err == nil && !ok {
				continue
			}
			n := 0
			if err == nil {
				n, err = g[j].bytes(shape)
			}
			if err == nil {
				err = g[j].load(src, m.pool, shape, memory[:n:n], m.config.NormOffset)
			}
			if err != nil {
				m.fail(i, err)
				return
			}
			memory = memory[n:]
			done += int64(n)
			if progress != nil {
				progress(done, all)
			}
		}
		m.took = time.Since(m.begun)
		close(m.loaded[i])
	}
}

// fail says why no further group comes.
func (m *Model) fail(from int, err error) {
	for i := from; i < len(m.loaded); i++ {
		m.failed[i] = err
		close(m.loaded[i])
	}
}

// await returns when a group is there.
func (m *Model) await(ctx context.Context, group int) error {
	select {
	case <-m.loaded[group]:
		return m.failed[group]
	case <-ctx.Done():
		return sandbox.E("model.await", "", "", ctx.Err())
	}
}

// Wait returns when all weights are there, or with the reason why they never
// will be.
func (m *Model) Wait(ctx context.Context) error {
	for i := range m.loaded {
		if err := m.await(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// LoadTime is how long it took until all weights were there. Wait must have
// returned.
func (m *Model) LoadTime() time.Duration { return m.took }

// Config is the shape of the whole model.
func (m *Model) Config() Config { return m.config }

// Shard is which part of it this is.
func (m *Model) Shard() Shard { return m.shard }

// Bytes is the memory of the weights.
func (m *Model) Bytes() int64 { return m.bytes }

// Layout is the shape of the pages that keep the shard's keys and values.
func (m *Model) Layout(numbers tensor.Type, pageLen int) cache.Layout {
	return Layout(m.config, m.shard, numbers, pageLen)
}

// Layout is what Model.Layout will be, before anything is loaded.
func Layout(c Config, s Shard, numbers tensor.Type, pageLen int) cache.Layout {
	if s == (Shard{}) {
		s = c.Whole()
	}
	return cache.Layout{Layers: s.Last - s.First, KV: tensor.KVShape{Type: numbers, Heads: c.KVHeads / s.Ranks, HeadDim: c.HeadDim, PageLen: pageLen}}
}

// Close stops loading and gives the memory back. Nothing of the model may be in use.
func (m *Model) Close() error {
	m.stop()
	m.loader.Wait()
	return m.memory.Free()
}
