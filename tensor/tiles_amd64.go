package tensor

import "unsafe"

// An unpacker takes apart 16 packed rows: bytes, [cols/32][8][16][4], and scales, [cols/32][parts, or twice that][16].
type unpacker = func(bytes *int8, scales *float32, w *byte, blocks int)

// tileTokens is how many tokens AMX takes at once.
const tileTokens = 16

// A tileScratch is the memory that a thread needs for AMX.
type tileScratch struct {
	results []byte // 3 KB on a cache line
	weights []byte // 16 rows taken apart, on a cache line
	scales  []float32
	part    []float32 // results of rows that are not all there
}

// aligned returns n bytes that start on a cache line, made of b if it is large enough.
func aligned(b []byte, n int) []byte {
	if cap(b) >= n {
		return b[:n]
	}
	b = make([]byte, n+64)
	return b[-uintptr(unsafe.Pointer(&b[0]))&63:][:n]
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
		s = &tileScratch{results: aligned(nil, 3<<10)}
	}
	defer p.scratch.Put(s)
	for g := lo; g < hi; g++ {
		dst, stride, rows := d.Dst[g*Lanes:], d.Stride, min(d.W.Rows-g*Lanes, Lanes)
		if rows < Lanes {
			s.part = grow(s.part, tiles*tileTokens*Lanes)
			clear(s.part)
			dst, stride = s.part, Lanes
		}
		if d.W.Type.Quantised() {
			s.dot(dst, stride, d.W, g, in, tiles)
		} else {
			s.cols(dst, stride, d.W, g, in, tiles)
		}
		if rows < Lanes {
			for t := range tiles * tileTokens {
				Add(d.Dst[t*d.Stride+g*Lanes:][:rows], s.part[t*Lanes:][:rows])
			}
		}
	}
	return tiles * tileTokens
}

func (s *tileScratch) dot(dst []float32, stride int, w Matrix, g int, in *Input, tiles int) {
	f := formats[w.Type]
	units, kind := w.Cols/columns, f.sums
	each := kind.parts
	if kind.bias == 0 {
		each *= 2
	}
	s.weights, s.scales = aligned(s.weights, units*columns*Lanes), grow(s.scales, units*each*Lanes)
	bytes := (*int8)(unsafe.Pointer(&s.weights[0]))
	unpackers[w.Type](bytes, &s.scales[0], &w.group(g)[0], w.Cols/f.len)
	kernel := tileDot1
	switch {
	case kind.parts == 2 && kind.bias == 0:
		kernel = tileDot2Offset
	case kind.parts == 2:
		kernel = tileDot2
	case kind.bias == 0:
		kernel = tileDot1Offset
	}
	kernel(&dst[0], stride, bytes, &s.scales[0], &in.q[0], &in.d[0], &in.sums[kind][0], units, tiles, &s.results[0])
}

func (s *tileScratch) cols(dst []float32, stride int, w Matrix, g int, in *Input, tiles int) {
	units, group := w.Cols/columns, &w.group(g)[0]
	if w.Type == BF16 { // as tiles want them
		tileCols1(&dst[0], stride, group, &in.split[0], units, tiles, &s.results[0])
		return
	}
	s.weights = aligned(s.weights, units*2*columns*Lanes*2)
	halves := (*uint16)(unsafe.Pointer(&s.weights[0]))
	if w.Type == F16 {
		splitF16(halves, group, units)
	} else {
		splitF32(halves, group, units)
	}
	tileCols2(&dst[0], stride, &s.weights[0], &in.split[0], units, tiles, &s.results[0])
}
