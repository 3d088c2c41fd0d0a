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

// ours is our engine without the parts that serve many: texts side by side, one pass after the other.
type ours struct {
	ctx    context.Context
	file   *gguf.Reader
	tokens int // that all texts may have together

	pool  *tensor.Pool
	model *model.Model
	kv    *cache.Pool
	texts []*cache.Sequence
	next  []int32 // the token that follows each text
	took  float64 // seconds to load
	bytes int64   // of memory, beyond what there was
}

func openOurs(ctx context.Context, file string, tokens int) (*ours, error) {
	r, err := gguf.Open(file)
	return &ours{ctx: ctx, file: r, tokens: tokens}, err
}

// threads loads the model for so many.
func (o *ours) threads(n int) error {
	if err := o.drop(); err != nil {
		return err
	}
	before, start := residentBytes(0), time.Now()
	src, err := model.FromGGUFData(o.file.File, o.file)
	if err != nil {
		return err
	}
	o.pool = tensor.NewPool(n, tensor.Best())
	if o.model, err = model.Open(src, model.Options{Pool: o.pool}); err != nil {
		return err
	}
	if err := o.model.Wait(o.ctx); err != nil {
		return err
	}
	o.took, o.bytes = time.Since(start).Seconds(), residentBytes(0)-before
	layout := o.model.Layout(tensor.F16, 32)
	o.kv, err = cache.New(layout, (o.tokens+layout.KV.PageLen-1)/layout.KV.PageLen+batch, cache.Root("bench"))
	return err
}

func (o *ours) loaded() (float64, int64) { return o.took, o.bytes }

// drop gives back what threads took.
func (o *ours) drop() error {
	var err error
	o.texts = nil
	if o.kv != nil {
		err = o.kv.Close()
	}
	if o.model != nil {
		err = errors.Join(err, o.model.Close())
	}
	if o.pool != nil {
		o.pool.Close()
	}
	o.kv, o.model, o.pool = nil, nil, nil
	return err
}

func (o *ours) close() error { return errors.Join(o.drop(), o.file.Close()) }

// begin makes n new texts.
func (o *ours) begin(n int) {
	for _, t := range o.texts {
		t.Release()
	}
	o.texts, o.next = o.texts[:0], o.next[:0]
	for i := range n {
		o.texts, o.next = append(o.texts, o.kv.NewSequence("")), append(o.next, prompt(i))
	}
}

// pass computes so many tokens more of each text and finds the likeliest that follows.
func (o *ours) pass(tokens []int32) error {
	b := &model.Batch{Tokens: tokens}
	each := len(tokens) / len(o.texts)
	for _, t := range o.texts {
		start := t.Len()
		if !t.Grow(each) {
			return errors.New("no room for keys and values")
		}
		b.Parts = append(b.Parts, model.Part{Pages: t.Pages(), Start: start, Tokens: each, Last: 1})
	}
	r, err := o.model.Forward(o.ctx, o.kv, b)
	if err != nil {
		return err
	}
	vocabulary := len(r.Logits) / len(o.texts)
	for i, t := range o.texts {
		t.Commit(tokens[i*each : (i+1)*each]...)
		logits := r.Logits[i*vocabulary : (i+1)*vocabulary]
		o.next[i] = 0
		for id, v := range logits {
			if v > logits[o.next[i]] {
				o.next[i] = int32(id)
			}
		}
	}
	return nil
}

func (o *ours) prefill(n int) (float64, error) {
	o.begin(1)
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
		tokens := make([]int32, len(o.next))
		copy(tokens, o.next)
		if err := o.pass(tokens); err != nil {
			return 0, err
		}
	}
	return time.Since(start).Seconds(), nil
}

// many writes n tokens of each of batch new texts.
func (o *ours) many(n int) (float64, error) {
	o.begin(batch)
	return o.decode(n)
}

// prompt is the i-th token of what is read.
func prompt(i int) int32 { return int32(100 + i*7%1000) }

// A memory is read to find out how fast this machine can.
type memory struct{ *tensor.Memory }

func newMemory() (memory, error) {
	const size = 256 << 20
	mem, err := tensor.Alloc(size)
	if err != nil {
		return memory{}, err
	}
	for i := 0; i < size; i += 4096 {
		mem.Bytes()[i] = 1
	}
	return memory{mem}, nil
}

// sweep returns with how many bytes a second so many threads read.
func (m memory) sweep(threads int) float64 {
	p := tensor.NewPool(threads, tensor.Best())
	defer p.Close()
	start := time.Now()
	p.Sweep(m.Bytes())
	return float64(len(m.Bytes())) / time.Since(start).Seconds()
}
