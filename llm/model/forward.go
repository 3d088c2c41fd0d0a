package model

import (
	"context"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Batch is what one pass computes: consecutive tokens of one or several texts.
type Batch struct {
	Tokens []int32 // of all parts, one after the other
	Parts  []Part
	// Hidden is [tokens][Dim], the state that the shard of the layers before
	// handed on; only for a shard without the embedding, which changes it.
	Hidden []float32
	// StatesOnly asks for Result.States instead of logits: embeddings of text.
	StatesOnly bool
}

// Part is the next tokens of one text.
type Part struct {
	Pages  []cache.Page // of the text, with room for these tokens
	Start  int          // position of the first
	Tokens int
	Last   int // of how many tokens, from the end, the result is wanted
	Sparse tensor.Sparse
}

// Block is how many consecutive tokens of a part, from a multiple of it on, are computed as a block, which is faster and
// rounds differently than one by one. A text that is computed in parts which begin and end at multiples of Block gets the
// same results however it is cut, and whatever is computed along with it.
const Block = 32

// blocks returns the part's tokens in whole blocks.
func (p *Part) blocks() (from, to int) {
	return (p.Start+Block-1)/Block*Block - p.Start, (p.Start+p.Tokens)/Block*Block - p.Start
}

// Result is what a pass found. Its slices are valid until the next pass.
type Result struct {
	Logits []float32 // [wanted tokens][Vocab], in the order of the batch
	States []float32 // [wanted tokens][Dim], after the last norm
	Hidden []float32 // [tokens][Dim], for the shard of the layers that follow
}

// state is the buffers of a pass.
type state struct {
	input                                 tensor.Input
	hidden, normed, partial, last, logits []float32
	q, k, v, gathered, gate, up           []float32
	angles, localAngles                   []float32
	runs                                  []run
	outputs                               []int
	many, manyOutputs                     []tensor.Range // rows of prompts
	sequences                             []tensor.Sequence
	pages                                 [][]byte
}

// run is consecutive tokens of a batch whose keys and values are kept in one page.
type run struct {
	page     cache.Page
	at       int // slot of the first
	from, to int // tokens
}

// pass is one walk over the steps.
type pass struct {
	m           *Model
	kv          *cache.Pool
	batch       *Batch
	tokens      []int32
	hidden      []float32
	angles      []float32 // [tokens][angleLen]
	localAngles []float32
	angleLen    int
	runs        []run
	outputs     []int // rows of the wanted tokens
	statesOnly  bool
}

// Forward computes a batch. The keys and values of its tokens are written to the
// pages of kv, whose layout must be the shard's. It waits for weights that have
// not arrived yet.
func (m *Model) Forward(ctx context.Context, kv *cache.Pool, b *Batch) (Result, error) {
	p, err := m.begin(kv, b)
	if err != nil {
		return Result{}, err
	}
	if err := m.run(ctx, p); err != nil {
		return Result{}, err
	}
	c, n := &m.config, len(p.outputs)
	r := Result{Hidden: p.hidden}
	if m.shard.concludes(c) {
		r.States = m.state.last[:n*c.Dim]
		if !b.StatesOnly {
			r.Logits = m.state.logits[:n*c.Vocab]
		}
	}
	return r, nil
}

// begin checks a batch and prepares the buffers.
func (m *Model) begin(kv *cache.Pool, b *Batch) (*pass, error) {
	const op = "model.Forward"
	c, s, layout := &m.config, &m.state, kv.Layout()
	n := len(b.Tokens)
	if want := m.Layout(layout.KV.Type, layout.KV.PageLen); layout != want {
		return nil, sandbox.Errorf(op, sandbox.Internal, "", "keys and values are kept as %+v, not as %+v", layout, want)
	}
	for _, t := range b.Tokens {
		if t < 0 || int(t) >= c.Vocab {
			return nil, sandbox.Errorf(op, sandbox.Invalid, "", "token %d of a vocabulary of %d", t, c.Vocab)
		}
	}
	s.runs, s.outputs, s.many, s.manyOutputs = s.runs[:0], s.outputs[:0], s.many[:0], s.manyOutputs[:0]
	row := 0
	for _, part := range b.Parts {
		if part.Tokens < 1 || part.Start < 0 || part.Last > part.Tokens || row+part.Tokens > n ||
			(part.Start+part.Tokens-1)/layout.KV.PageLen >= len(part.Pages) {
			return nil, sandbox.Errorf(op, sandbox.Internal, "", "%d tokens from %d on, over %d pages", part.Tokens, part.Start, len(part.Pages))
		}
		for t := 0; t < part.Tokens; {
			at := (part.Start + t) % layout.KV.PageLen
			n := min(layout.KV.PageLen-at, part.Tokens-t)
			s.runs = append(s.runs, run{part.Pages[(part.Start+t)/layout.KV.PageLen], at, row + t, row + t + n})
			t += n
		}
		if from, to := part.blocks(); from < to {
			s.many = append(s.many, tensor.Range{From: row + from, To: row + to})
		}
		if part.Last >= Block { // as when a text is judged, not generated
			s.manyOutputs = append(s.manyOutputs, tensor.Range{From: len(s.outputs), To: len(s.outputs) + part.Last/Block*Block})
		}
		for t := part.Tokens - part.Last; t < part.Tokens; t++ {
			s.outputs = append(s.outputs, row+t)
		}
		row += part.Tokens
	}
	if row != n || n == 0 {
		return nil, sandbox.Errorf(op, sandbox.Internal, "", "%d tokens in parts of %d", n, row)
	}
	m.grow(n, len(s.outputs), b.StatesOnly)
	p := &pass{m: m, kv: kv, batch: b, tokens: b.Tokens, hidden: s.hidden[:n*c.Dim], runs: s.runs, outputs: s.outputs, statesOnly: b.StatesOnly}
	if !m.shard.embeds() {
		if len(b.Hidden) != n*c.Dim {
			return nil, sandbox.Errorf(op, sandbox.Internal, "", "a state of %d numbers for %d tokens", len(b.Hidden), n)
		}
		p.hidden = b.Hidden
	}
	p.rotate()
	return p, nil
}

// grow makes the buffers large enough.
func (m *Model) grow(n, outputs int, statesOnly bool) {
	c, s := &m.config, &m.state
	q, kv := m.shard.heads(c.Heads, c.HeadDim).len(), m.shard.heads(c.KVHeads, c.HeadDim).len()
	columns := m.shard.cut(c.FFN, m.columnUnit).len()
	for _, b := range []struct {
		buf *[]float32
		len int
	}{
		{&s.hidden, n * c.Dim}, {&s.normed, n * c.Dim}, {&s.partial, n * c.Dim}, {&s.q, n * q}, {&s.k, n * kv}, {&s.v, n * kv},
		{&s.gathered, n * q}, {&s.gate, n * columns}, {&s.up, n * columns}, {&s.last, outputs * c.Dim},
		{&s.angles, n * 2 * len(c.Rope.Freq)}, {&s.localAngles, n * 2 * len(c.LocalRope.Freq)},
	} {
		if len(*b.buf) < b.len {
			*b.buf = make([]float32, b.len)
		}
	}
	if need := outputs * c.Vocab; !statesOnly && m.shard.concludes(c) && len(s.logits) < need {
		s.logits = make([]float32, need)
	}
}

// rotate computes by which angles each token's heads turn.
func (p *pass) rotate() {
	c, s := &p.m.config, &p.m.state
	p.angleLen = 2 * len(c.Rope.Freq)
	p.angles, p.localAngles = s.angles, s.localAngles
	row := 0
	for _, part := range p.batch.Parts {
		for t := range part.Tokens {
			tensor.Angles(p.angles[row*p.angleLen:(row+1)*p.angleLen], c.Rope.Freq, part.Start+t, c.Rope.Magnitude)
			if c.Local != nil {
				tensor.Angles(p.localAngles[row*p.angleLen:(row+1)*p.angleLen], c.LocalRope.Freq, part.Start+t, c.LocalRope.Magnitude)
			}
			row++
		}
	}
}

// sequences is what each part attends to in layer i. The result is valid until
// the next call.
func (p *pass) sequences(i int) []tensor.Sequence {
	s, size := &p.m.state, p.kv.Layout().KV.PageLen
	s.sequences, s.pages = s.sequences[:0], s.pages[:0]
	total := 0
	for _, part := range p.batch.Parts {
		total += (part.Start + part.Tokens + size - 1) / size
	}
	if cap(s.pages) < total { // the parts' slices must not move
		s.pages = make([][]byte, 0, 2*total)
	}
	for _, part := range p.batch.Parts {
		from, n := len(s.pages), (part.Start+part.Tokens+size-1)/size
		for _, page := range part.Pages[:n] {
			s.pages = append(s.pages, p.kv.Block(page, i))
		}
		s.sequences = append(s.sequences, tensor.Sequence{Pages: s.pages[from:], Start: part.Start, Tokens: part.Tokens, Sparse: part.Sparse})
	}
	return s.sequences
}
