package tensor

import "math"

// An Input is activations, [tokens][cols], in the forms that products read. The zero Input can be Set; it keeps its buffers.
// It must not be in more than one MatMul at a time.
type Input struct {
	x            []float32
	tokens, cols int
	many         []Range // of tokens

	// The int8 form: x in steps of a scale that 32 columns of a token share. Tokens are taken in tiles of as many as kernels
	// multiply at once, and lie interleaved: for each 32 columns, the tile's first token, its second, and so on.
	tiles  []tile    // none until it has been made
	q      []int8    // [tile][cols/32][token of the tile][32]
	d      []float32 // [tile][cols/32][token of the tile] scales
	halves []int32   // [tile][cols/32][token of the tile][2] sums of 16 columns of q each
	made   []summed  // which sums are up to date
	sums   map[summed][]uint32

	// The BF16 form, for AMX, of the tokens in many, in one plane or two: [tile of 16][cols/32][planes][16][32].
	// The first of the two is the nearest to a number, the second what is left.
	bf16 [2][]uint16
	// For AVX-512, of all tokens: [tokens][cols].
	short []uint16
}

// A tile is tokens that are multiplied at once.
type tile struct{ first, tokens int }

// tileSizes are how many tokens kernels take at once.
var tileSizes = [...]int{1, 4, 8}

// summed says which sums of activations a type's kernels take: of q times -bias as integers, to make up for bytes that are too
// large by bias; or, if bias is 0, of q times the scale as floats, for what a type adds to each number. Either is kept as its
// 32 bits, [tile][cols/32][token of the tile][parts].
type summed struct {
	bias  int32
	parts int // 1 or 2: scales in 32 columns
}

// columns is how many activations share a scale.
const columns = 32

// A Range is the tokens from From to To-1.
type Range struct{ From, To int }

// manyTokens is what ranges of many tokens are multiples of.
const manyTokens = 16

// Set takes x, [tokens][cols], which must stay as it is while the Input is used. many, in ascending order, are the tokens that
// may be computed in a way that pays for many at once; their numbers must be multiples of 16. How a token's results are rounded
// depends on whether it is among them, and on nothing else that is computed along with it.
func (in *Input) Set(x []float32, tokens, cols int, many ...Range) {
	in.x, in.tokens, in.cols, in.many = x[:tokens*cols], tokens, cols, append(in.many[:0], many...)
	in.tiles, in.made = in.tiles[:0], in.made[:0]
	for i := range in.bf16 {
		in.bf16[i] = in.bf16[i][:0]
	}
	in.short = in.short[:0]
}

// tile cuts the tokens that are not in ranges of many into tiles.
func (in *Input) tile(isa ISA, many []Range) {
	first := 0
	for _, r := range append(many[:len(many):len(many)], Range{in.tokens, in.tokens}) {
		sizes := tileSizes[:map[ISA]int{Scalar: 1, AVX2: 2, AVX512: 3, AVX512BF16: 3, AMX: 3, NEON: 2, DotProd: 2}[isa]]
		for first < r.From {
			n := sizes[len(sizes)-1]
			for ; n > r.From-first; n = sizes[len(sizes)-1] {
				sizes = sizes[:len(sizes)-1]
			}
			in.tiles = append(in.tiles, tile{first, n})
			first += n
		}
		first = r.To
	}
}

// round makes the int8 form and the sums of the given kind, unless they have been made, of tokens that are not in many.
func (in *Input) round(p *Pool, kind summed, many []Range) {
	blocks := in.cols / columns
	if len(in.tiles) == 0 {
		in.tile(p.isa, many)
		// Tiles may be read a little beyond the last.
		in.q = grow(in.q, len(in.x)+1024)
		in.d, in.halves = grow(in.d, in.tokens*blocks), grow(in.halves, in.tokens*blocks*2)
		p.Run(len(in.tiles), max(1, 4096/in.cols), func(lo, hi int) {
			for _, t := range in.tiles[lo:hi] {
				for i := range t.tokens {
					at := t.first*blocks + i
					roundRow(p.isa, in.q[at*columns:], in.d[at:], in.halves[2*at:], in.x[(t.first+i)*in.cols:][:in.cols], t.tokens)
				}
			}
		})
	}
	for _, k := range in.made {
		if k == kind {
			return
		}
	}
	in.made = append(in.made, kind)
	if in.sums == nil {
		in.sums = map[summed][]uint32{}
	}
	s := grow(in.sums[kind], in.tokens*blocks*kind.parts)
	in.sums[kind] = s
	p.Run(len(in.tiles), max(1, 4096/blocks), func(lo, hi int) {
		for _, t := range in.tiles[lo:hi] {
			kind.fill(s, in.halves, in.d, t.first*blocks, (t.first+t.tokens)*blocks)
		}
	})
}

// fill computes the sums of blocks lo to hi.
func (k summed) fill(s []uint32, halves []int32, d []float32, lo, hi int) {
	if k.parts == 1 {
		for i := lo; i < hi; i++ {
			s[i] = k.word(halves[2*i]+halves[2*i+1], d[i])
		}
		return
	}
	for i := 2 * lo; i < 2*hi; i++ {
		s[i] = k.word(halves[i], d[i/2])
	}
}

func (k summed) word(sum int32, d float32) uint32 {
	if k.bias == 0 {
		return math.Float32bits(float32(sum) * d)
	}
	return uint32(-k.bias * sum)
}

// roundScalar rounds x by blocks of 32 that lie step blocks apart in q, d and halves.
func roundScalar(q []int8, d []float32, halves []int32, x []float32, step int) {
	for b := range len(x) / columns {
		d[b*step] = roundBlock(q[b*step*columns:][:columns], halves[2*b*step:], x[b*columns:][:columns])
	}
}

// roundBlock writes 32 numbers in steps of the scale that it returns, such that the largest is 127, and the sums of both halves.
func roundBlock(q []int8, halves []int32, x []float32) float32 {
	var top float32
	for _, v := range x {
		top = max(top, v, -v)
	}
	d := top / 127
	var inv float32
	if d >= 0x1p-126 { // below, 1/d may be infinite
		inv = 1 / d
	}
	halves[0], halves[1] = 0, 0
	for i, v := range x {
		q[i] = int8(math.RoundToEven(float64(v * inv)))
		halves[i/16] += int32(q[i])
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
