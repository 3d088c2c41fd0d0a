//go:build amd64 || arm64

package tensor

import "slices"

// A dotKernel adds to dst, [tokens][stride], the products of 16 packed rows with a tile of rounded activations. ahead is 0 if
// the rows have been read just before, and what follows them is not to be fetched.
type dotKernel = func(dst *float32, stride int, w *byte, q *int8, d *float32, sums *uint32, blocks, ahead int)

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

// multiplyDot computes groups lo to hi of rows for the tokens that were rounded to int8.
func multiplyDot(isa ISA, d *Product, in *Input, lo, hi int) {
	f := formats[d.W.Type]
	kernels := dotKernels[isa.kernels()][d.W.Type]
	sums := in.sums[f.sums]
	per := in.cols / columns
	tiles := in.tiles
	for len(tiles) > 0 {
		n := 1
		for n < len(tiles) && tiles[n].first < tiles[0].first+batch {
			n++
		}
		for g := lo; g < hi; g++ {
			w := d.W.group(g)
			rows := min(d.W.Rows-g*Lanes, Lanes)
			for i, t := range tiles[:n] {
				at, ahead := t.first*per, first(i)
				kernel := kernels[slices.Index(tileSizes[:], t.tokens)]
				dst := d.Dst[t.first*d.Stride+g*Lanes:]
				if rows == Lanes {
					kernel(&dst[0], d.Stride, &w[0], &in.q[at*columns], &in.d[at], &sums[at*f.sums.parts], in.cols/f.len, ahead)
					continue
				}
				var r part
				kernel(&r[0], Lanes, &w[0], &in.q[at*columns], &in.d[at], &sums[at*f.sums.parts], in.cols/f.len, ahead)
				r.addTo(dst, d.Stride, rows, t.tokens)
			}
		}
		tiles = tiles[n:]
	}
}

// multiplyCols computes rows w, from group lo on, for tokens first to end.
func multiplyCols(isa ISA, d *Product, w Matrix, lo int, in *Input, first, end int) {
	for t := first; t < end; t += batch {
		addCols(isa, d.Dst[t*d.Stride+lo*Lanes:], d.Stride, w, in.x[t*in.cols:], in.cols, min(batch, end-t), 1)
	}
}

// first is 1 for 0.
func first(i int) int {
	if i == 0 {
		return 1
	}
	return 0
}

// addCols adds to dst, [tokens][stride], the product of a matrix that is not quantised with x, [tokens][xstride]. ahead is 1 if
// the matrix goes on in memory where its rows end.
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
				kernel(&dst[t*stride+g*Lanes], stride, &data[0], &x[t*xstride], xstride, w.Cols, ahead*first(t))
			} else {
				var r part
				kernel(&r[0], Lanes, &data[0], &x[t*xstride], xstride, w.Cols, ahead*first(t))
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
