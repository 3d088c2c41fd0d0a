package tensor

import "unsafe"

// Products of many tokens are computed by AMX in BF16. What is rounded away of quantised weights and of their activations,
// which loses less than rounding activations to int8 would, is at most one part in 256 of each; numbers of other types
// are taken as the sum of two BF16 numbers, which loses nothing that counts.

// An expander turns 16 packed rows of a quantised type into tiles: [columns/2][16][2] BF16.
type expander = func(dst *uint16, w *byte, blocks int)

const (
	tileTokens = manyTokens
	// unit is the numbers of a tile: 32 columns of 16 tokens, or of 16 rows.
	unit = tileTokens * columns
	// near and together are how many units and tiles are multiplied with a range of rows before the next: expanded weights
	// and activations stay in the second cache.
	near, together = 64, 16
)

// A tileScratch is the memory that a thread needs for AMX.
type tileScratch struct {
	weights []uint16 // of two groups of rows, near units each
	results []float32
	tokens  []int // first of each tile
}

// tiled returns the tokens that AMX computes.
func (p *Pool) tiled(in *Input) []Range {
	if p.isa != AMX || in.cols%columns != 0 {
		return nil
	}
	return in.many
}

// split makes what multiplyMany takes, once: the BF16 form of the tokens in tiles, with as many planes as the type of the weights
// needs, or that of all tokens.
func (in *Input) split(p *Pool, w Type) {
	if p.paired(in, w) {
		in.shorten(p)
		return
	}
	planes := 2
	if w.Quantised() {
		planes = 1
	}
	many, units := p.tiled(in), in.cols/columns
	if len(in.bf16[planes-1]) > 0 || len(many) == 0 {
		return
	}
	tokens := 0
	for _, r := range many {
		tokens += r.To - r.From
	}
	to := aligned(in.bf16[planes-1], tokens*in.cols*planes)
	in.bf16[planes-1] = to
	kernel := splitRow1
	if planes == 2 {
		kernel = splitRow2
	}
	first := 0 // place of a range's first token
	for _, r := range many {
		p.Run(r.To-r.From, 4, func(lo, hi int) {
			for t := lo; t < hi; t++ {
				place := first + t
				kernel(&to[place/tileTokens*units*unit*planes+place%tileTokens*columns], &in.x[(r.From+t)*in.cols], units)
			}
		})
		first += r.To - r.From
	}
}

// aligned returns n numbers on a cache line, made of b if it is large enough.
func aligned(b []uint16, n int) []uint16 {
	const line = 64
	if cap(b) >= n {
		return b[:n]
	}
	b = make([]uint16, n+line/2)
	return b[-uintptr(unsafe.Pointer(&b[0]))&(line-1)/2:][:n]
}

// multiplyMany computes groups lo to hi of rows for the ranges of tokens that it returns.
func (p *Pool) multiplyMany(d *Product, in *Input, lo, hi int) []Range {
	switch {
	case p.paired(in, d.W.Type):
		multiplyPairs(d, in, lo, hi)
		return in.many
	case len(p.tiled(in)) > 0:
		p.multiplyTiles(d, in, lo, hi)
		return in.many
	}
	return nil
}

// multiplyTiles computes groups lo to hi of rows for the tokens in tiles.
func (p *Pool) multiplyTiles(d *Product, in *Input, lo, hi int) {
	s, _ := p.scratch.Get().(*tileScratch)
	if s == nil {
		s = &tileScratch{weights: aligned(nil, 2*2*near*unit), results: make([]float32, 4*tileTokens*Lanes)}
	}
	defer p.scratch.Put(s)
	s.tokens = s.tokens[:0]
	for _, r := range p.tiled(in) {
		for t := r.From; t < r.To; t += tileTokens {
			s.tokens = append(s.tokens, t)
		}
	}
	units := in.cols / columns
	for t := 0; t < len(s.tokens); t += together {
		for u := 0; u < units; u += near {
			for g := lo; g < hi; g += 2 {
				s.multiply(d, in, g, min(2, hi-g), u, min(near, units-u), t, min(t+together, len(s.tokens)))
			}
		}
	}
}

// multiply computes groups (1 or 2) of rows from g on, n units of columns from u on, for tiles from t to end.
func (s *tileScratch) multiply(d *Product, in *Input, g, groups, u, n, t, end int) {
	kernel, planes := tiles2x2, 2
	switch {
	case d.W.Type.Quantised():
		kernel, planes = tiles1x1, 1
	case d.W.Type == BF16:
		kernel = tiles1x2
	}
	w := [2]*uint16{}
	for i := range w { // a second one that is not there is the first again
		w[i] = s.expand(&d.W, g+min(i, groups-1), i, u, n)
	}
	x := in.bf16[planes-1]
	step := in.cols / columns * unit * planes // from tile to tile
	for ; t < end; t += 2 {
		pair := min(2, end-t)
		at := t*step + u*unit*planes
		kernel(&s.results[0], w[0], w[1], &x[at], &x[at+(pair-1)*step], n)
		for i := range pair {
			for j := range groups {
				s.add(d, s.tokens[t+i], g+j, s.results[(2*i+j)*tileTokens*Lanes:])
			}
		}
	}
}

// expand returns n units of a group of rows from unit u on, as tiles.
func (s *tileScratch) expand(w *Matrix, g, place, u, n int) *uint16 {
	f := formats[w.Type]
	from := &w.group(g)[u*columns/f.len*f.bytes*Lanes]
	if w.Type == BF16 { // as tiles want them
		return (*uint16)(unsafe.Pointer(from))
	}
	to := &s.weights[place*2*near*unit]
	switch w.Type {
	case F16:
		splitF16(to, from, n)
	case F32:
		splitF32(to, from, n)
	case F8_E4M3:
		splitF8_E4M3(to, from, n)
	case F8_E5M2:
		splitF8_E5M2(to, from, n)
	default:
		expanders[w.Type](to, from, n*columns/f.len)
	}
	return to
}

// add adds a product of tiles to the result.
func (s *tileScratch) add(d *Product, token, g int, tile []float32) {
	dst := d.Dst[token*d.Stride+g*Lanes:]
	if rows := d.W.Rows - g*Lanes; rows < Lanes {
		for t := range tileTokens {
			Add(dst[t*d.Stride:][:rows], tile[t*Lanes:][:rows])
		}
		return
	}
	addTile(&dst[0], d.Stride, &tile[0])
}
