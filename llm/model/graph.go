package model

import (
	"context"
	"fmt"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Exchange names what the ranks of a layer must do with each other's results.
type Exchange uint8

// The exchanges. After either all ranks have the same.
const (
	Nothing Exchange = iota
	Sum              // every rank has a summand of all numbers
	Gather           // every rank has a part of the numbers, and zeros elsewhere
)

// Point is a place in the graph at which ranks exchange.
type Point struct {
	Step     int // the number of the step, the same in every rank
	Exchange Exchange
}

// ExchangeFunc brings data, which it changes, in step with the other ranks'.
type ExchangeFunc func(ctx context.Context, at Point, data []float32) error

// Step is one part of a forward pass. It computes, exchanges what it computed
// with the ranks that share its layers, and merges that into the state.
type Step struct {
	Name     string
	Layer    int // -1 for the embedding and the head
	Exchange Exchange

	group   int                    // of weights, which must be there
	compute func(*pass) []float32  // returns what is exchanged
	merge   func(*pass, []float32) // nil when there is nothing to merge
}

// Steps lists the shard's part of the graph in order.
func (m *Model) Steps() []Step { return m.steps }

func (m *Model) graph() []Step {
	var steps []Step
	c, s := &m.config, m.shard
	if s.embeds() {
		steps = append(steps, Step{Name: "embedding", Layer: -1, compute: m.embed})
	}
	for i := range m.layers {
		l := &m.layers[i]
		steps = append(steps,
			Step{Name: "attention", Layer: s.First + i, Exchange: Sum, group: 1 + i,
				compute: func(p *pass) []float32 { return m.attend(p, i) },
				merge:   func(p *pass, part []float32) { m.merge(p, part, l.attnPost) }},
			Step{Name: "feed forward", Layer: s.First + i, Exchange: Sum, group: 1 + i,
				compute: func(p *pass) []float32 { return m.feed(p, i) },
				merge:   func(p *pass, part []float32) { m.merge(p, part, l.ffnPost) }})
	}
	if s.concludes(c) {
		steps = append(steps, Step{Name: "head", Layer: -1, Exchange: Gather, group: 1 + len(m.layers), compute: m.conclude})
	}
	return steps
}

// embed writes the state of each token.
func (m *Model) embed(p *pass) []float32 {
	c := &m.config
	m.pool.Run(len(p.tokens), 1, func(lo, hi int) {
		for t := lo; t < hi; t++ {
			x := p.hidden[t*c.Dim : (t+1)*c.Dim]
			m.embedding.Row(x, int(p.tokens[t]))
			if c.EmbedScale != 0 {
				tensor.Scale(x, c.EmbedScale)
			}
		}
	})
	return nil
}

// attend computes the shard's heads of layer i: [tokens][Dim], a summand of what
// the layer's attention adds to the state.
func (m *Model) attend(p *pass, i int) []float32 {
	c, l, b := &m.config, &m.layers[i], &m.state
	n, q, kv := len(p.tokens), l.q.Rows, l.k.Rows
	m.norm2(b.normed, p.hidden, l.attnNorm)
	m.set(i, "attn_q", b.normed, n, c.Dim)
	m.pool.MatMul(&b.input, tensor.Product{W: l.q, Dst: b.q}, tensor.Product{W: l.k, Dst: b.k}, tensor.Product{W: l.v, Dst: b.v})
	angles, window := p.angles, 0
	if c.Local != nil && c.Local[m.shard.First+i] {
		angles, window = p.localAngles, c.Window
	}
	layout := p.kv.Layout().KV
	m.pool.Run(n, 1, func(lo, hi int) {
		for t := lo; t < hi; t++ {
			qt, kt, vt := b.q[t*q:(t+1)*q], b.k[t*kv:(t+1)*kv], b.v[t*kv:(t+1)*kv]
			if l.qBias != nil {
				tensor.Add(qt, l.qBias)
			}
			if l.kBias != nil {
				tensor.Add(kt, l.kBias)
			}
			if l.vBias != nil {
				tensor.Add(vt, l.vBias)
			}
			if l.qNorm != nil {
				tensor.RMSNorm(qt, qt, l.qNorm, c.Eps)
			}
			if l.kNorm != nil {
				tensor.RMSNorm(kt, kt, l.kNorm, c.Eps)
			}
			turn := tensor.RotateHalves
			if c.Paired {
				turn = tensor.RotatePairs
			}
			at := angles[t*p.angleLen : (t+1)*p.angleLen]
			turn(qt, c.HeadDim, at)
			turn(kt, c.HeadDim, at)
		}
	})
	m.pool.Run(len(p.runs), 1, func(lo, hi int) {
		for _, r := range p.runs[lo:hi] {
			layout.Store(p.kv.Block(r.page, i), r.at, b.k[r.from*kv:r.to*kv], b.v[r.from*kv:r.to*kv])
		}
	})
	m.pool.Attend(tensor.Attention{KV: layout, Heads: q / c.HeadDim, Scale: c.AttnScale, Window: window, Softcap: c.AttnCap},
		b.gathered[:n*q], b.q[:n*q], p.sequences(i))
	m.set(i, "attn_output", b.gathered, n, q)
	m.pool.MatMul(&b.input, tensor.Product{W: l.o, Dst: b.partial})
	return b.partial[:n*c.Dim]
}

// feed computes the shard's columns of the feed-forward part of layer i:
// [tokens][Dim], a summand of what it adds to the state.
func (m *Model) feed(p *pass, i int) []float32 {
	c, l, b := &m.config, &m.layers[i], &m.state
	n, columns := len(p.tokens), l.gate.Rows
	m.norm2(b.normed, p.hidden, l.ffnNorm)
	m.set(i, "ffn_gate", b.normed, n, c.Dim)
	m.pool.MatMul(&b.input, tensor.Product{W: l.gate, Dst: b.gate}, tensor.Product{W: l.up, Dst: b.up})
	act := tensor.SiLUMul
	if c.GELU {
		act = tensor.GELUMul
	}
	m.pool.Run(n*columns, 1024, func(lo, hi int) { act(b.gate[lo:hi], b.gate[lo:hi], b.up[lo:hi]) })
	m.set(i, "ffn_down", b.gate, n, columns)
	m.pool.MatMul(&b.input, tensor.Product{W: l.down, Dst: b.partial})
	return b.partial[:n*c.Dim]
}

// set makes x, [n][cols], the input of the products that follow in layer i, the first
// of which has the named weights.
func (m *Model) set(i int, name string, x []float32, n, cols int) {
	m.state.input.Set(x, n, cols, m.state.many...)
	if m.tap != nil {
		m.tap(fmt.Sprintf("blk.%d.%s.weight", m.shard.First+i, name), x[:n*cols], cols)
	}
}

// merge adds a sum of all ranks to the state, after a norm where the family has one.
func (m *Model) merge(p *pass, part, norm []float32) {
	if norm != nil {
		m.norm2(part, part, norm)
	}
	m.pool.Run(len(part), 4096, func(lo, hi int) { tensor.Add(p.hidden[lo:hi], part[lo:hi]) })
}

// norm2 is tensor.RMSNorm by all threads.
func (m *Model) norm2(dst, x, weight []float32) {
	dim := m.config.Dim
	m.pool.Run(len(x)/dim, 4, func(lo, hi int) {
		tensor.RMSNorm(dst[lo*dim:hi*dim], x[lo*dim:hi*dim], weight, m.config.Eps)
	})
}

// conclude computes the shard's part of the vocabulary for the tokens of which it
// was asked: [outputs][Vocab].
func (m *Model) conclude(p *pass) []float32 {
	c, b := &m.config, &m.state
	n := len(p.outputs)
	if n == 0 {
		return nil
	}
	for i, t := range p.outputs {
		copy(b.last[i*c.Dim:(i+1)*c.Dim], p.hidden[t*c.Dim:(t+1)*c.Dim])
	}
	m.norm2(b.last[:n*c.Dim], b.last[:n*c.Dim], m.norm)
	if p.statesOnly {
		return nil
	}
	part := m.shard.vocabulary(c)
	if m.shard.Ranks > 1 {
		clear(b.logits[:n*c.Vocab])
	}
	head := m.head
	if c.Tied {
		head = m.embedding.SliceRows(part.from, part.to)
	}
	b.input.Set(b.last, n, c.Dim, b.manyOutputs...)
	m.pool.MatMul(&b.input, tensor.Product{W: head, Dst: b.logits[part.from:], Stride: c.Vocab})
	if c.LogitCap > 0 {
		for i := range n {
			tensor.Softcap(b.logits[i*c.Vocab+part.from:i*c.Vocab+part.to], c.LogitCap)
		}
	}
	return b.logits[:n*c.Vocab]
}

// run takes a pass through all steps.
func (m *Model) run(ctx context.Context, p *pass) error {
	for i := range m.steps {
		s := &m.steps[i]
		if err := m.await(ctx, s.group); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return sandbox.E("model.Forward", "", "", err)
		}
		part := s.compute(p)
		if m.exchange != nil && s.Exchange != Nothing && part != nil {
			if err := m.exchange(ctx, Point{Step: i, Exchange: s.Exchange}, part); err != nil {
				return err
			}
		}
		if s.merge != nil {
			s.merge(p, part)
		}
	}
	return nil
}
