package tensor

import "math"

// An Attention is what the layers of a model have in common.
type Attention struct {
	KV      KVShape
	Heads   int     // query heads, a multiple of KV.Heads; as many in a row share a key head
	Scale   float32 // of the products of query and key
	Window  int     // how many positions a token sees, its own included; 0 means all before it
	Softcap float32 // see Softcap; 0 means none
}

// A Sequence is consecutive tokens of one stream, whose keys and values are in Pages already. Page i holds positions
// i*PageLen and on.
type Sequence struct {
	Pages  [][]byte
	Start  int // position of the first token that asks
	Tokens int // how many ask
	Sparse Sparse
}

// queries are rows that read the same keys: some heads of some tokens of a sequence. Row i is head i%group of those that share
// a key head, of token i/group.
type queries struct {
	Sequence
	token  int // of the sequence's first token in dst and q
	head   int // key head
	lo, hi int // rows
}

// tileRows is how many query rows are taken together.
const tileRows = 8

// Attend writes, for each token of each sequence in turn, what its heads gather: dst and q are [tokens][Heads][HeadDim].
func (p *Pool) Attend(a Attention, dst, q []float32, sequences []Sequence) {
	group := a.Heads / a.KV.Heads
	var work []queries
	token := 0
	for _, s := range sequences {
		for head := range a.KV.Heads {
			for lo := 0; lo < s.Tokens*group; lo += tileRows {
				work = append(work, queries{s, token, head, lo, min(lo+tileRows, s.Tokens*group)})
			}
		}
		token += s.Tokens
	}
	p.Run(len(work), 1, func(lo, hi int) {
		t := p.tile(&a)
		for _, w := range work[lo:hi] {
			t.run(dst, q, w)
		}
		p.tiles.Put(t)
	})
}

// An attendTile is the memory that a thread works in.
type attendTile struct {
	*Attention
	isa      ISA
	q        []float32 // [tileRows][HeadDim] times Scale
	x        []float32 // as q, turned where keys are
	out      []float32 // [tileRows][HeadDim] weighted values
	s        []float32 // [tileRows][PageLen] scores, then weights
	top, sum [tileRows]float32

	// For choosing pages.
	pages, order  []int
	signed, bound []float32
}

func (p *Pool) tile(a *Attention) *attendTile {
	t, _ := p.tiles.Get().(*attendTile)
	if t == nil {
		t = &attendTile{}
	}
	t.Attention, t.isa = a, p.isa
	n := tileRows * a.KV.HeadDim
	t.q, t.x, t.out, t.s = grow(t.q, n), grow(t.x, n), grow(t.out, n), grow(t.s, tileRows*a.KV.PageLen)
	return t
}

// at is where a row's numbers begin in dst and q.
func (t *attendTile) at(w queries, row int) int {
	group := t.Heads / t.KV.Heads
	return ((w.token+row/group)*t.Heads + w.head*group + row%group) * t.KV.HeadDim
}

// span is the positions that a row sees.
func (t *attendTile) span(w queries, row int) (first, end int) {
	end = w.Start + row/(t.Heads/t.KV.Heads) + 1
	if t.Window > 0 {
		first = max(0, end-t.Window)
	}
	return first, end
}

// run goes through the pages once. Weights are relative to the largest score so far; when a larger one comes, what has been
// gathered is made smaller.
func (t *attendTile) run(dst, q []float32, w queries) {
	dim, rows := t.KV.HeadDim, w.hi-w.lo
	for i := range rows {
		row := t.q[i*dim : (i+1)*dim]
		copy(row, q[t.at(w, w.lo+i):])
		scale(t.isa, row, t.Scale)
		t.top[i], t.sum[i] = float32(math.Inf(-1)), 0
	}
	wide := t.wide(rows)
	clear(t.q[rows*dim : wide*dim])
	clear(t.out[:wide*dim])
	x := t.q
	if t.KV.rounded() {
		copy(t.x, t.q[:wide*dim])
		x = t.x
		turn(x[:rows*dim], dim)
	}
	first, _ := t.span(w, w.lo)
	_, end := t.span(w, w.hi-1)
	for _, page := range t.choose(w, first, end) {
		n := min(end-page*t.KV.PageLen, t.KV.PageLen) // tokens of the page that any row sees
		clear(t.s[:wide*t.KV.PageLen])
		addCols(t.isa, t.s, t.KV.PageLen, t.KV.keys(w.Pages[page], w.head, n), x, dim, wide, 0)
		t.rescale(w, page, rows, 0)
		for i := range rows {
			lo, hi := t.span(w, w.lo+i)
			t.weigh(i, lo-page*t.KV.PageLen, hi-page*t.KV.PageLen)
		}
		t.rescale(w, page, rows, 1)
		addCols(t.isa, t.out, dim, t.KV.values(w.Pages[page], w.head, n), t.s, t.KV.PageLen, wide, 0)
	}
	if t.KV.rounded() {
		turn(t.out[:rows*dim], dim)
	}
	for i := range rows {
		out := dst[t.at(w, w.lo+i):][:dim]
		copy(out, t.out[i*dim:])
		if t.sum[i] > 0 {
			scale(t.isa, out, 1/t.sum[i])
		}
	}
}

// wide is how many rows are computed for so many. A kernel for four reads a page once, four for one do four times; and kernels for
// four and eight add in the same order, that for one in another: a token must get the same results alone and among others.
func (t *attendTile) wide(rows int) int {
	switch {
	case t.isa == Scalar:
		return rows
	case rows <= 4:
		return 4
	}
	return tileRows
}

// rescale multiplies what rows have of a page's tokens by the scales of keys, 0, or values, 1.
func (t *attendTile) rescale(w queries, page, rows, which int) {
	if !t.KV.rounded() {
		return
	}
	keys, values := t.KV.scales(t.KV.head(w.Pages[page], w.head))
	for i := range rows {
		mulHalf(t.isa, t.s[i*t.KV.PageLen:(i+1)*t.KV.PageLen], [][]byte{keys, values}[which])
	}
}

// weigh turns a row's scores of a page into weights; it sees those from lo to hi.
func (t *attendTile) weigh(row, lo, hi int) {
	n, dim := t.KV.PageLen, t.KV.HeadDim
	s := t.s[row*n : (row+1)*n]
	lo, hi = max(lo, 0), min(hi, n)
	if lo >= hi {
		clear(s)
		return
	}
	if t.Softcap > 0 {
		Softcap(s[lo:hi], t.Softcap)
	}
	for i := range lo {
		s[i] = float32(math.Inf(-1))
	}
	for i := hi; i < n; i++ {
		s[i] = float32(math.Inf(-1))
	}
	if top := largest(t.isa, s); top > t.top[row] {
		less := exp(t.top[row] - top)
		scale(t.isa, t.out[row*dim:(row+1)*dim], less)
		t.sum[row] *= less
		t.top[row] = top
	}
	t.sum[row] += expSum(t.isa, s, t.top[row])
}
