package main

import (
	"context"
	"errors"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/tensor"
)

// ours is our engine without the parts that serve many: one text at a time.
type ours struct {
	ctx    context.Context
	file   *gguf.Reader
	pool   *tensor.Pool
	model  *model.Model
	kv     *cache.Pool
	text   *cache.Sequence
	next   int32 // the token that follows
	tokens int   // that a text may have
}

func openOurs(ctx context.Context, file string, threads, tokens int) (engine, error) {
	r, err := gguf.Open(file)
	if err != nil {
		return nil, err
	}
	src, err := model.FromGGUFData(r.File, r)
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	o := &ours{ctx: ctx, file: r, pool: tensor.NewPool(threads, tensor.Best()), tokens: tokens}
	if o.model, err = model.Open(src, model.Options{Pool: o.pool}); err == nil {
		err = o.model.Wait(ctx)
	}
	if err == nil {
		layout := o.model.Layout(tensor.F16, 64)
		o.kv, err = cache.New(layout, (tokens+layout.KV.PageLen-1)/layout.KV.PageLen, cache.Root("bench"))
	}
	if err != nil {
		return nil, errors.Join(err, o.close())
	}
	return o, nil
}

func (o *ours) close() error {
	var err error
	if o.kv != nil {
		err = o.kv.Close()
	}
	if o.model != nil {
		err = errors.Join(err, o.model.Close())
	}
	o.pool.Close()
	return errors.Join(err, o.file.Close())
}

// pass computes tokens and finds the likeliest that follows.
func (o *ours) pass(tokens []int32) error {
	start := o.text.Len()
	if !o.text.Grow(len(tokens)) {
		return errors.New("no room for keys and values")
	}
	r, err := o.model.Forward(o.ctx, o.kv, &model.Batch{Tokens: tokens, Parts: []model.Part{{Pages: o.text.Pages(), Start: start, Tokens: len(tokens), Last: 1}}})
	if err != nil {
		return err
	}
	o.text.Commit(tokens...)
	o.next = 0
	for i, v := range r.Logits {
		if v > r.Logits[o.next] {
			o.next = int32(i)
		}
	}
	return nil
}

func (o *ours) prefill(n int) (float64, error) {
	if o.text != nil {
		o.text.Release()
	}
	o.text = o.kv.NewSequence("")
	tokens := make([]int32, n)
	for i := range tokens {
		tokens[i] = prompt(i)
	}
	start := time.Now()
	err := o.pass(tokens)
	return time.Since(start).Seconds(), err
}

func (o *ours) decode(n int) (float64, error) {
	start := time.Now()
	for range n {
		if err := o.pass([]int32{o.next}); err != nil {
			return 0, err
		}
	}
	return time.Since(start).Seconds(), nil
}

// prompt is the i-th token of what is read.
func prompt(i int) int32 { return int32(100 + i*7%1000) }

// sweep measures how fast each number of threads reads memory, in bytes a second.
func sweep(threads []int, rounds int) (map[int]float64, error) {
	const size = 512 << 20
	mem, err := tensor.Alloc(size)
	if err != nil {
		return nil, err
	}
	defer func() { _ = mem.Free() }()
	for i := 0; i < size; i += 4096 {
		mem.Bytes()[i] = 1
	}
	speeds := map[int]float64{}
	for _, n := range threads {
		p := tensor.NewPool(n, tensor.Best())
		var all []float64
		for range 2*rounds + 1 {
			start := time.Now()
			p.Sweep(mem.Bytes())
			all = append(all, size/time.Since(start).Seconds())
		}
		p.Close()
		speeds[n] = median(all)
	}
	return speeds, nil
}
