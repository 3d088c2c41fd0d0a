package tensor

// Where there is no AMX but AVX512_BF16, weights in BF16 are multiplied with many tokens in pairs of numbers. Activations are
// rounded to BF16, which loses less than the rounding of those that quantised weights are multiplied with.

// paired tells whether the tokens in many are multiplied so.
func (p *Pool) paired(in *Input, w Type) bool {
	return p.isa == AVX512BF16 && w == BF16 && len(in.many) > 0 && in.cols%columns == 0
}

// shorten makes the BF16 form of all tokens, once.
func (in *Input) shorten(p *Pool) {
	if len(in.short) > 0 {
		return
	}
	in.short = aligned(in.short, len(in.x))
	p.Run(in.tokens, max(1, 1<<15/in.cols), func(lo, hi int) {
		shorten(&in.short[lo*in.cols], &in.x[lo*in.cols], (hi-lo)*in.cols)
	})
}

const (
	pairTokens = 8 // that the kernel takes
	// pairColumns is how many columns are multiplied with a batch of tokens before the next: weights and activations stay in
	// the second cache.
	pairColumns = 1024
)

// multiplyPairs computes groups lo to hi of rows for the tokens in many.
func multiplyPairs(d *Product, in *Input, lo, hi int) {
	for _, r := range in.many {
		for t := r.From; t < r.To; t += batch {
			for c := 0; c < in.cols; c += pairColumns {
				for g := lo; g < hi; g += 2 {
					multiplyPair(d, in, g, min(2, hi-g), t, min(t+batch, r.To), c, min(pairColumns, in.cols-c))
				}
			}
		}
	}
}

// multiplyPair computes one or two groups of rows for tokens t to end and n columns from c on.
func multiplyPair(d *Product, in *Input, g, groups, t, end, c, n int) {
	const size = 2 * Lanes // bytes of a column
	w0 := &d.W.group(g)[c*size]
	w1 := w0 // if there is no second, the first again
	if groups == 2 {
		w1 = &d.W.group(g + 1)[c*size]
	}
	rows := min(d.W.Rows-g*Lanes, groups*Lanes)
	for ahead := prefetchBy; t < end; t, ahead = t+pairTokens, 0 {
		x, dst := &in.short[t*in.cols+c], d.Dst[t*d.Stride+g*Lanes:]
		if rows == 2*Lanes {
			pairsBF16(&dst[0], d.Stride, w0, w1, x, in.cols, n, ahead)
			continue
		}
		var r [pairTokens * 2 * Lanes]float32
		pairsBF16(&r[0], 2*Lanes, w0, w1, x, in.cols, n, ahead)
		for i := range pairTokens {
			Add(dst[i*d.Stride:][:rows], r[i*2*Lanes:][:rows])
		}
	}
}
