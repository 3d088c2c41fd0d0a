package tensor

import "math"

// An Input is activations, [tokens][cols], in the forms that products read. The zero Input can be Set; it keeps its buffers.
type Input struct {
	x            []float32
	tokens, cols int

	rounded bool      // whether what follows has been made of x
	q       []int8    // [tokens][cols] x in steps of its block's d; a block has 32 columns
	d       []float32 // [tokens][cols/32]
}

// Set takes x, [tokens][cols], which must stay as it is while the Input is used.
func (in *Input) Set(x []float32, tokens, cols int) {
	in.x, in.tokens, in.cols, in.rounded = x[:tokens*cols], tokens, cols, false
}

// block is how many activations share a scale.
const block = 32

// round makes the int8 form, once.
func (in *Input) round(p *Pool) {
	if in.rounded {
		return
	}
	in.rounded = true
	in.q, in.d = grow(in.q, len(in.x)), grow(in.d, len(in.x)/block)
	p.Run(len(in.d), 64, func(lo, hi int) {
		for b := lo; b < hi; b++ {
			in.d[b] = roundBlock(in.q[b*block:(b+1)*block], in.x[b*block:(b+1)*block])
		}
	})
}

// roundBlock writes x in steps of the scale that it returns, such that the largest is 127.
func roundBlock(q []int8, x []float32) float32 {
	var top float32
	for _, v := range x {
		top = max(top, v, -v)
	}
	d := top / 127
	inv := inverse(d)
	for i, v := range x {
		q[i] = int8(math.RoundToEven(float64(v * inv)))
	}
	return d
}

// grow returns a slice of length n, made of s if it is large enough. The content is undefined.
func grow[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n)
	}
	return s[:n]
}
