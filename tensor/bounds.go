package tensor

import (
	"cmp"
	"math"
	"slices"
)

// A Sparse says which pages a sequence's tokens attend to; the zero value says all.
type Sparse struct {
	Near  int // tokens before the present one that always are attended to; with 0 and no Pages, all
	First int // tokens at the beginning of the text that always are
	Pages int // of the other pages, so many are attended to besides: those whose keys may be nearest to the queries
}

// all tells whether nothing is left out.
func (s Sparse) all() bool { return s.Near <= 0 && s.Pages <= 0 }

// For each number of a head's keys a page keeps the largest and the smallest that any of its tokens has, before rounding. From
// these follows the most that the product of a query with any of the keys can be (as in Quest): the product of the bounds with
// the query's positive numbers, then its negative ones.

// boundBytes is the size of one head's bounds, in F16: HeadDim largest numbers, then as many smallest.
func (s KVShape) boundBytes() int { return 2 * 2 * s.HeadDim }

// bounds returns the bounds of a head's keys.
func (s KVShape) bounds(head []byte) []byte { return head[len(head)-s.boundBytes():] }

// widen takes a key into the bounds. The first of a page begins them. A key that is written anew, since a guess was wrong, leaves
// them wider than they must be.
func (s KVShape) widen(head []byte, slot int, k []float32) {
	high, low := s.bounds(head)[:2*s.HeadDim], s.bounds(head)[2*s.HeadDim:]
	for i, x := range k {
		if slot == 0 || x > getHalf(high[2*i:]) {
			putHalf(high[2*i:], x)
		}
		if slot == 0 || x < getHalf(low[2*i:]) {
			putHalf(low[2*i:], x)
		}
	}
}

// choose lists the pages of first to end that rows of w attend to, in order.
func (t *attendTile) choose(w queries, first, end int) []int {
	size := t.KV.PageLen
	t.pages = t.pages[:0]
	from, to := first/size, (end+size-1)/size
	s := w.Sparse
	_, lowest := t.span(w, w.lo) // the end of what the first row sees
	sinks, near := (s.First+size-1)/size, max(0, lowest-s.Near)/size
	if s.all() || near <= max(from, sinks)+s.Pages {
		for page := from; page < to; page++ {
			t.pages = append(t.pages, page)
		}
		return t.pages
	}
	for page := from; page < sinks; page++ {
		t.pages = append(t.pages, page)
	}
	if s.Pages > 0 {
		t.pages = append(t.pages, t.likeliest(w, max(from, sinks), near)...)
	}
	for page := near; page < to; page++ {
		t.pages = append(t.pages, page)
	}
	return t.pages
}

// likeliest returns, in order, w.Sparse.Pages of the pages from to to-1: those in which some row's bound is least below the
// highest that it has anywhere. A row that finds one page far above all others so leaves the choice of the rest to those
// that do not.
func (t *attendTile) likeliest(w queries, from, to int) []int {
	dim, n := t.KV.HeadDim, to-from
	t.signed, t.bound, t.order = grow(t.signed, 2*dim), grow(t.bound, 2*n), grow(t.order, n)
	most, mine := t.bound[:n], t.bound[n:2*n]
	for i := range n {
		most[i], t.order[i] = float32(math.Inf(-1)), from+i
	}
	for row := range w.hi - w.lo {
		for i, x := range t.q[row*dim : (row+1)*dim] {
			t.signed[i], t.signed[dim+i] = max(x, 0), min(x, 0)
		}
		for i := range n {
			mine[i] = dotHalf(t.isa, t.KV.bounds(t.KV.head(w.Pages[from+i], w.head)), t.signed)
		}
		top := largest(t.isa, mine)
		for i, x := range mine {
			most[i] = max(most[i], x-top)
		}
	}
	order := t.order[:n]
	slices.SortFunc(order, func(a, b int) int { return cmp.Or(cmp.Compare(most[b-from], most[a-from]), cmp.Compare(a, b)) })
	order = order[:w.Sparse.Pages]
	slices.Sort(order)
	return order
}

// dotHalfScalar multiplies a row of F16 with x.
func dotHalfScalar(h []byte, x []float32) (sum float32) {
	for i, v := range x {
		sum += getHalf(h[2*i:]) * v
	}
	return sum
}

// mulHalfScalar multiplies x by a row of F16, number by number.
func mulHalfScalar(x []float32, h []byte) {
	for i := range x {
		x[i] *= getHalf(h[2*i:])
	}
}
