package tensor

// A Product is one matrix times an input: Dst[t][r] = sum over c of W[r][c] * x[t][c].
type Product struct {
	W      Matrix
	Dst    []float32 // [tokens][Stride], of which W.Rows are written
	Stride int       // 0 means W.Rows
	Add    bool      // add to what is in Dst: a residual, or another part of the columns
}

// MatMul computes products that share one input, of as many columns as each matrix has. If a matrix is quantised, so is the
// input, to int8 in blocks of 32 columns.
func (p *Pool) MatMul(in *Input, products ...Product) {
	groups, bytes := 0, 0
	for i := range products {
		d := &products[i]
		if d.W.Cols != in.cols {
			panic("tensor: a matrix has other columns than its input") // as an index out of range
		}
		in.split(p, d.W.Type)
		if d.W.Type.Quantised() {
			in.round(p, formats[d.W.Type].sums, p.tiled(in))
		}
		if d.Stride == 0 {
			d.Stride = d.W.Rows
		}
		groups += d.W.groups()
		bytes += d.W.Bytes()
	}
	// A range of fewer bytes is not worth waking a thread for.
	grain := max(1, 32<<10*groups/max(1, bytes*min(in.tokens, 8)))
	p.Run(groups, grain, func(lo, hi int) {
		for i := range products {
			n := products[i].W.groups()
			if lo < n && hi > 0 {
				p.multiply(&products[i], in, max(lo, 0), min(hi, n))
			}
			lo, hi = lo-n, hi-n
		}
	})
}

// groups counts the packed groups of rows, of which the last may be part.
func (m *Matrix) groups() int { return (m.Rows + Lanes - 1) / Lanes }

// multiplyScalar is what a product means.
func multiplyScalar(d *Product, in *Input, lo, hi int) {
	hi = min(hi*Lanes, d.W.Rows)
	for t := range in.tokens {
		if !d.Add {
			clear(d.Dst[t*d.Stride+lo*Lanes : t*d.Stride+hi])
		}
	}
	w, dst := d.W.SliceRows(lo*Lanes, hi), d.Dst[lo*Lanes:]
	if !d.W.Type.Quantised() {
		addColsScalar(dst, d.Stride, w, in.x, in.cols, in.tokens)
		return
	}
	row := make([]float32, w.Cols)
	for r := range w.Rows {
		w.Row(row, r)
		for t := range in.tokens {
			dst[t*d.Stride+r] += in.dot(row, t)
		}
	}
}

// addColsScalar adds to dst, [tokens][stride], the product of a matrix with x, [tokens][xstride].
func addColsScalar(dst []float32, stride int, w Matrix, x []float32, xstride, tokens int) {
	row := make([]float32, w.Cols)
	for r := range w.Rows {
		w.Row(row, r)
		for t := range tokens {
			var sum float64
			for i, v := range x[t*xstride:][:len(row)] {
				sum += float64(v) * float64(row[i])
			}
			dst[t*stride+r] += float32(sum)
		}
	}
}

// dot multiplies a row with the activations of one token as they were rounded, in tiles of one token.
func (in *Input) dot(row []float32, token int) float32 {
	var sum float64
	for b := range in.cols / columns {
		at := token*in.cols + b*columns
		var part float64
		for i, v := range in.q[at : at+columns] {
			part += float64(v) * float64(row[b*columns+i])
		}
		sum += part * float64(in.d[at/columns])
	}
	return float32(sum)
}
