//go:build amd64 || arm64

package tensor

import "slices"

// A dotKernel adds to dst, [tokens][stride], the products of 16 packed rows with a tile of rounded activations. ahead is how
// many bytes after what it reads it asks for memory, or 0 if nothing is to be fetched.
type dotKernel = func(dst *float32, stride int, w *byte, q *int8, d *float32, sums *uint32, blocks, ahead int)

// A twoKernel adds to dst the products of two groups of 16 packed rows with a tile of eight tokens.
type twoKernel = func(dst *float32, stride int, w0, w1 *byte, q *int8, d *float32, sums *uint32, blocks, ahead int)

// A colKernel adds to dst, [tokens][stride], the products of 16 packed rows with activations x, [tokens][xstride].
type colKernel = func(dst *float32, stride int, w *byte, x *float32, xstride int, cols, ahead int)

// roundRow rounds x by blocks of 32 that lie step blocks apart in q, d and halves.
func roundRow(isa ISA, q []int8, d []float32, halves []int32, x []float32, step int) {
	if isa == Scalar {
		roundScalar(q, d, halves, x, step)
		return
	}
	roundVector(&q[0], &d[0], &halves[0], &x[0], len(x)/columns, step)
}

// batch is how many tokens go through a range of rows before the next do: their activations stay in the cache.
const batch = 128

// multiply computes groups lo to hi of rows for all tokens.
func (p *Pool) multiply(d *Product, in *Input, lo, hi int) {
	if p.isa == Scalar {
		multiplyScalar(d, in, lo, hi)
		return
	}
	if !d.Add {
		rows := min(hi*Lanes, d.W.Rows) - lo*Lanes
		for t := range in.tokens {
			clear(d.Dst[t*d.Stride+lo*Lanes:][:rows])
		}
	}
	many := p.multiplyMany(d, in, lo, hi)
	if d.W.Type.Quantised() {
		multiplyDot(p.isa, d, in, lo, hi)
		return
	}
	w, first := d.W.SliceRows(lo*Lanes, min(hi*Lanes, d.W.Rows)), 0
	for _, r := range many {
		multiplyCols(p.isa, d, w, lo, in, first, r.From)
		first = r.To
	}
	multiplyCols(p.isa, d, w, lo, in, first, in.tokens)
}

// part is the result of a group whose rows are not all there, for as many tokens as a kernel takes.
type part [8 * Lanes]float32

// addTo adds the rows that are there.
func (r *part) addTo(dst []float32, stride, rows, tokens int) {
	for t := range tokens {
		Add(dst[t*stride:][:rows], r[t*Lanes:][:rows])
	}
}

// A dotProduct is what multiplying groups of rows with tokens that were rounded to int8 takes.
type dotProduct struct {
	*Product
	in      *Input
	f       *format
	kernels [len(tileSizes)]dotKernel
	two     twoKernel // nil if there is none
	sums    []uint32
}

// multiplyDot computes groups lo to hi of rows for the tokens that were rounded to int8.
func multiplyDot(isa ISA, d *Product, in *Input, lo, hi int) {
	f := formats[d.W.Type]
	p := dotProduct{d, in, f, dotKernels[isa.kernels()][d.W.Type], nil, in.sums[f.sums]}
	if isa.kernels() == AVX512 {
		p.two = twoKernels[d.W.Type]
	}
	tiles := in.tiles
	for len(tiles) > 0 {
		n := 1
		for n < len(tiles) && tiles[n].first < tiles[0].first+batch {
			n++
		}
		for g := lo; g < hi; {
			g += p.multiply(tiles[:n], g, hi-g)
		}
		tiles = tiles[n:]
	}
}

// multiply computes groups of rows from g on, at most so many, for tiles of tokens. It returns how many.
func (p *dotProduct) multiply(tiles []tile, g, most int) int {
	in, rows, groups := p.in, min(p.W.Rows-g*Lanes, Lanes), 1
	if p.two != nil && most > 1 && p.W.Rows >= (g+2)*Lanes && tiles[0].tokens == tileSizes[2] {
		groups = 2
	}
	per, size := in.cols/columns, in.cols/p.f.len
	for i, t := range tiles {
		at, ahead := t.first*per, fetch(i, prefetchBy)
		q, steps, sums := &in.q[at*columns], &in.d[at], &p.sums[at*p.f.sums.parts]
		kernel := p.kernels[slices.Index(tileSizes[:], t.tokens)]
		dst := p.Dst[t.first*p.Stride+g*Lanes:]
		switch {
		case rows < Lanes:
			var r part
			kernel(&r[0], Lanes, &p.W.group(g)[0], q, steps, sums, size, ahead)
			r.addTo(dst, p.Stride, rows, t.tokens)
		case groups == 2 && t.tokens == tileSizes[2]: // ahead are the next two
			p.two(&dst[0], p.Stride, &p.W.group(g)[0], &p.W.group(g + 1)[0], q, steps, sums, size, fetch(i, 2*p.W.stride))
		default:
			for i := range groups {
				kernel(&dst[i*Lanes], p.Stride, &p.W.group(g + i)[0], q, steps, sums, size, ahead)
			}
		}
	}
	return groups
}

// multiplyCols computes rows w, from group lo on, for tokens first to end.
func multiplyCols(isa ISA, d *Product, w Matrix, lo int, in *Input, first, end int) {
	for t := first; t < end; t += batch {
		addCols(isa, d.Dst[t*d.Stride+lo*Lanes:], d.Stride, w, in.x[t*in.cols:], in.cols, min(batch, end-t), prefetchBy)
	}
}

// prefetchBy is how far ahead weights are asked for when they are read for the first time.
const prefetchBy = 8192

// fetch is how far ahead the i-th tile of tokens asks for the weights that all of them read.
func fetch(i, by int) int {
	if i == 0 {
		return by
	}
	return 0
}

// addCols adds to dst, [tokens][stride], the product of a matrix that is not quantised with x, [tokens][xstride]. ahead is
// prefetchBy, or 0 if the matrix is as small as a page of keys.
func addCols(isa ISA, dst []float32, stride int, w Matrix, x []float32, xstride, tokens, ahead int) {
	if isa == Scalar {
		addColsScalar(dst, stride, w, x, xstride, tokens)
		return
	}
	kernels := colKernels[isa.kernels()][w.Type]
	for g := range w.groups() {
		data := w.group(g)
		rows := min(w.Rows-g*Lanes, Lanes)
		for t := 0; t < tokens; {
			kernel, n := widest(kernels, tokens-t)
			if rows == Lanes {
				kernel(&dst[t*stride+g*Lanes], stride, &data[0], &x[t*xstride], xstride, w.Cols, fetch(t, ahead))
			} else {
				var r part
				kernel(&r[0], Lanes, &data[0], &x[t*xstride], xstride, w.Cols, fetch(t, ahead))
				r.addTo(dst[t*stride+g*Lanes:], stride, rows, n)
			}
			t += n
		}
	}
}

// widest returns the kernel for the most tokens up to n, and how many those are.
func widest(kernels [len(tileSizes)]colKernel, n int) (colKernel, int) {
	for i := len(tileSizes) - 1; i > 0; i-- {
		if tileSizes[i] <= n && kernels[i] != nil {
			return kernels[i], tileSizes[i]
		}
	}
	return kernels[0], 1
}
