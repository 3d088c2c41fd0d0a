package tensor

import "unsafe"

// An unpacker takes apart 16 packed rows: bytes, [cols/32][8][16][4], and scales, [cols/32][parts, or twice that][16].
type unpacker = func(bytes *int8, scales *float32, w *byte, blocks int)

// tileTokens is how many tokens AMX takes at once.
const tileTokens = 16

// A tileScratch is the memory that a thread needs for AMX.
type tileScratch struct {
	results []byte // a page
	weights []byte // 16 rows taken apart, on a cache line
	scales  []float32
	part    []float32 // results of rows that are not all there
}

// aligned returns n bytes that start on a multiple of to, made of b if it is large enough.
func aligned(b []byte, n int, to uintptr) []byte {
	if cap(b) >= n {
		return b[:n]
	}
	b = make([]byte, n+int(to))
	return b[-uintptr(unsafe.Pointer(&b[0]))&(to-1):][:n]
}

// halve makes the split form, once, if there are enough tokens.
func (in *Input) halve(p *Pool) {
	tiles, units := in.tokens/tileTokens, in.cols/columns
	if p.isa != AMX || len(in.split) > 0 || tiles == 0 || in.cols%columns != 0 {
		return
	}
	in.split = grow(in.split, tiles*units*2*tileTokens*columns)
	p.Run(tiles, 1, func(lo, hi int) {
		for t := lo * tileTokens; t < hi*tileTokens; t++ {
			at := t/tileTokens*units*2*tileTokens*columns + t%tileTokens*columns
			splitRow(&in.split[at], &in.x[t*in.cols], units)
		}
	})
}

// multiplyTiles computes groups lo to hi of rows for the tokens that make whole tiles of AMX's, and returns how many those are.
func (p *Pool) multiplyTiles(d *Product, in *Input, lo, hi int) int {
	tiles := in.tokens / tileTokens
	if tiles == 0 || in.cols%(2*columns) != 0 {
		return 0
	}
	s, _ := p.scratch.Get().(*tileScratch)
	if s == nil {
		s = &tileScratch{results: aligned(nil, 4<<10, 4<<10)}
	}
	defer p.scratch.Put(s)
	// As many tiles at once as half of the second cache holds.
	some := max(1, 1<<20/(in.cols*tileTokens))
	for first := 0; first < tiles; first += some {
		n := min(some, tiles-first)
		for g := lo; g < hi; g++ {
			s.multiply(d, in, g, first, n)
		}
	}
	return tiles * tileTokens
}

// multiply computes a group of rows for some tiles.
func (s *tileScratch) multiply(d *Product, in *Input, g, first, tiles int) {
	dst, stride, rows := d.Dst[first*tileTokens*d.Stride+g*Lanes:], d.Stride, min(d.W.Rows-g*Lanes, Lanes)
	to := dst
	if rows < Lanes {
		s.part = grow(s.part, tiles*tileTokens*Lanes)
		clear(s.part)
		to, stride = s.part, Lanes
	}
	if d.W.Type.Quantised() {
		s.dot(to, stride, d.W, g, in, first, tiles)
	} else {
		s.cols(to, stride, d.W, g, in, first, tiles)
	}
	if rows < Lanes {
		for t := range tiles * tileTokens {
			Add(dst[t*d.Stride:][:rows], s.part[t*Lanes:][:rows])
		}
	}
}

// near is how many units of 32 columns are multiplied with all tokens before the next: weights taken apart stay in the
// nearest cache.
const near = 32

// dot multiplies a group of quantised rows with some tiles, of which first is the first.
func (s *tileScratch) dot(dst []float32, stride int, w Matrix, g int, in *Input, first, tiles int) {
	f := formats[w.Type]
	kind := f.sums
	each := kind.parts
	kernel := tileDot1
	switch {
	case kind.parts == 2 && kind.bias == 0:
		kernel, each = tileDot2Offset, 4
	case kind.parts == 2:
		kernel = tileDot2
	case kind.bias == 0:
		kernel, each = tileDot1Offset, 2
	}
	s.weights, s.scales = aligned(s.weights, near*columns*Lanes+1024, 64), grow(s.scales, near*each*Lanes)
	bytes := (*int8)(unsafe.Pointer(&s.weights[0]))
	units := w.Cols / columns
	for u := 0; u < units; u += near {
		n := min(near, units-u)
		at := u * columns / f.len * f.bytes * Lanes
		unpackers[w.Type](bytes, &s.scales[0], &w.group(g)[at], n*columns/f.len)
		from := (first*units + u) * tileTokens
		kernel(&dst[0], stride, bytes, &s.scales[0], &in.q[from*columns], &in.d[from], &in.sums[kind][from*kind.parts],
			n, units-n, tiles, &s.results[0])
	}
}

// cols is dot for rows that are not quantised.
func (s *tileScratch) cols(dst []float32, stride int, w Matrix, g int, in *Input, first, tiles int) {
	units, group := w.Cols/columns, &w.group(g)[0]
	x := &in.split[first*units*2*tileTokens*columns]
	if w.Type == BF16 { // as tiles want them
		tileCols1(&dst[0], stride, group, x, units, tiles, &s.results[0])
		return
	}
	s.weights = aligned(s.weights, units*2*columns*Lanes*2, 64)
	halves := (*uint16)(unsafe.Pointer(&s.weights[0]))
	if w.Type == F16 {
		splitF16(halves, group, units)
	} else {
		splitF32(halves, group, units)
	}
	tileCols2(&dst[0], stride, &s.weights[0], x, units, tiles, &s.results[0])
}
