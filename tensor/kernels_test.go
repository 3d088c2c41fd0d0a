package tensor

import (
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
)

// isas returns what this machine can run beside the reference.
func isas() []ISA {
	all := map[string][]ISA{"amd64": {AVX2, AVX512, AVX512BF16, AMX}, "arm64": {NEON, DotProd}}[runtime.GOARCH]
	return slices.DeleteFunc(all, func(i ISA) bool { return i > Best() })
}

// activations returns random ones with what is hard: a block of zeros, denormals, one large number among small, equal ones.
func activations(r *rand.Rand, tokens, cols int) []float32 {
	x := numbers(r, tokens*cols)
	for b := 0; b+32 <= len(x); b += 32 {
		block := x[b : b+32]
		switch r.IntN(12) {
		case 0:
			clear(block)
		case 1:
			for i := range block {
				block[i] = math.Float32frombits(r.Uint32N(1 << 23))
			}
		case 2:
			block[r.IntN(32)] = -3e4
		case 3:
			for i := range block {
				block[i] = -1.5
			}
		}
	}
	return x
}

// scaleBytes are where blocks have their scales and minima in F16.
var scaleBytes = map[Type][]int{Q4_0: {0}, Q5_0: {0}, Q8_0: {0}, IQ4_NL: {0}, IQ4_XS: {0}, Q4_1: {0, 2}, Q5_1: {0, 2}, Q4_K: {0, 2}, Q5_K: {0, 2},
	Q2_K: {80, 82}, Q3_K: {108}, Q6_K: {208}, Q3_0: {0}, Q3_1: {0, 2}}

// extremes sets weights to what is at the ends of the type: all bits set, all clear, infinite precision lost.
func extremes(r *rand.Rand, t Type, src []byte) {
	scales := scaleBytes[t]
	for at := 0; scales != nil && at < len(src); at += t.BlockBytes() {
		b := src[at : at+t.BlockBytes()]
		fill := byte(0)
		switch r.IntN(8) {
		case 0:
			fill = 0xff
		case 1:
			fill = 0x80
		case 2:
		default:
			continue
		}
		for i := range b {
			b[i] = fill
		}
		for _, s := range scales {
			putHalf(b[s:], []float32{0, 6e-8, -0.01, 3}[r.IntN(4)])
		}
	}
}

// product multiplies with the given instructions, into memory that starts as 1 everywhere, of which a part is added to.
func product(isa ISA, threads int, m Matrix, x []float32, tokens int) []float32 {
	p := NewPool(threads, isa)
	defer p.Close()
	stride := m.Rows + 3
	dst := make([]float32, tokens*stride)
	for i := range dst {
		dst[i] = 1
	}
	var in Input
	in.Set(x, tokens, m.Cols, many(tokens)...)
	upper := m.Rows / 2 / Lanes * Lanes
	p.MatMul(&in, Product{W: m.SliceRows(0, upper), Dst: dst, Stride: stride}, Product{W: m.SliceRows(upper, m.Rows), Dst: dst[upper:], Stride: stride, Add: true})
	return dst
}

func TestKernelsComputeWhatTheReferenceDoes(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 1))
	for _, typ := range types() {
		for _, shape := range [][3]int{{16, 256, 1}, {37, 512, 3}, {64, 1024, 8}, {48, 256, 29}, {32, 768, 140}} {
			rows, cols, tokens := shape[0], shape[1], shape[2]
			src := weights(t, r, typ, rows*cols)
			extremes(r, typ, src)
			m := pack(t, Shape{typ, rows, cols}, src)
			x := activations(r, tokens, cols)
			want := product(Scalar, 1, m, x, tokens)
			for _, isa := range isas() {
				got := product(isa, 2, m, x, tokens)
				want := want
				if isa == AMX && typ.Quantised() || isa == AVX512BF16 && typ == BF16 { // many are rounded to BF16
					want = slices.Clone(want)
					stride := m.Rows + 3
					for _, r := range many(tokens) {
						from, to := r.From*stride, r.To*stride
						copy(want[from:to], got[from:to])
						nearly(t, typ.String()+" tiles", got[from:to], exact(m, x[r.From*cols:], r.To-r.From), m, x[r.From*cols:], 0x1p-7)
					}
				}
				nearly(t, typ.String()+" "+isa.String(), got, want, m, x, 3e-5)
				if t.Failed() {
					return
				}
			}
		}
	}
}

// Whole numbers are multiplied and added exactly: with scales of 1 results are whole, and no order of additions may change them.
func TestWholeNumbersAreMultipliedExactly(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 2))
	const rows, cols, tokens = 32, 256, 13
	for typ, scales := range scaleBytes {
		src := weights(t, r, typ, rows*cols)
		for at := range src {
			src[at] = byte(r.Uint32())
		}
		for at := 0; at < len(src); at += typ.BlockBytes() {
			for _, s := range scales {
				putHalf(src[at+s:], 1)
			}
		}
		m := pack(t, Shape{typ, rows, cols}, src)
		x := make([]float32, tokens*cols) // small enough for sums below 1<<24
		for i := range x {
			x[i] = float32(r.IntN(7) - 3)
			if i%columns == 5 {
				x[i] = 127
			}
		}
		want := product(Scalar, 1, m, x, tokens)
		for _, isa := range isas() {
			if got := product(isa, 1, m, x, tokens); !slices.Equal(got, want) {
				t.Errorf("%v by %v differs from the reference", typ, isa)
			}
		}
	}
}

// many returns ranges of 16 and of more tokens, with others between.
func many(tokens int) []Range {
	if tokens < 64 {
		return nil
	}
	return []Range{{3, 19}, {20, 20 + (tokens-20)/16*16}}
}

// exact returns what product should.
func exact(m Matrix, x []float32, tokens int) []float32 {
	stride := m.Rows + 3
	dst := make([]float32, tokens*stride)
	for i := range dst {
		dst[i] = 1
	}
	for t := range tokens { // the upper part is not added to
		clear(dst[t*stride:][:m.Rows/2/Lanes*Lanes])
	}
	addColsScalar(dst, stride, m, x, m.Cols, tokens)
	return dst
}

// nearly compares by the size of what was summed up, of which close is the part that rounding errors may be.
func nearly(t *testing.T, name string, got, want []float32, m Matrix, x []float32, close float64) {
	t.Helper()
	row := make([]float32, m.Cols)
	stride := m.Rows + 3
	for i := range want {
		r, tok := i%stride, i/stride
		if r >= m.Rows {
			if got[i] != 1 {
				t.Errorf("%s: wrote beside the rows", name)
			}
			continue
		}
		if got[i] == want[i] {
			continue
		}
		m.Row(row, r)
		var size float64
		for c, v := range x[tok*m.Cols : (tok+1)*m.Cols] {
			size += math.Abs(float64(v) * float64(row[c]))
		}
		// What is added and subtracted again, as the minimum of a type is, is larger than the sum of the numbers.
		if diff := math.Abs(float64(got[i] - want[i])); !(diff <= close*size+1e-5) {
			t.Errorf("%s: %d x %d: token %d row %d is %v, want %v (of %v)", name, m.Rows, m.Cols, tok, r, got[i], want[i], size)
			return
		}
	}
}

func TestColumnsOfAMatrixMakeTheWholeProduct(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	for _, typ := range types() {
		const rows, cols, tokens = 32, 1024, 5
		m := pack(t, Shape{typ, rows, cols}, weights(t, r, typ, rows*cols))
		x := activations(r, tokens, cols)
		p := NewPool(1, Best())
		got := make([]float32, tokens*(rows+3))
		for i := range got {
			got[i] = 1
		}
		for i, cut := range [][2]int{{0, 256}, {256, 1024}} {
			part := make([]float32, 0, tokens*cols)
			for tok := range tokens {
				part = append(part, x[tok*cols+cut[0]:tok*cols+cut[1]]...)
			}
			var in Input
			in.Set(part, tokens, cut[1]-cut[0])
			p.MatMul(&in, Product{W: m.SliceCols(cut[0], cut[1]), Dst: got, Stride: rows + 3, Add: i > 0})
		}
		want := make([]float32, len(got))
		for i := range want {
			want[i] = 1
		}
		var in Input
		in.Set(x, tokens, cols)
		p.MatMul(&in, Product{W: m, Dst: want, Stride: rows + 3})
		nearly(t, typ.String(), got, want, m, x, 3e-5)
		p.Close()
	}
}

func TestInputsAreRoundedAlikeByAll(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 1))
	x := activations(r, 1, 4096)
	wantQ, wantD, wantS := make([]int8, 4096), make([]float32, 128), make([]int32, 256)
	roundRow(Scalar, wantQ, wantD, wantS, x, 1)
	for _, isa := range isas() {
		q, d, s := make([]int8, 4096*2), make([]float32, 128*2), make([]int32, 256*2)
		roundRow(isa, q, d, s, x, 2)
		for i := range wantQ {
			if q[i/32*64+i%32] != wantQ[i] || d[i/32*2] != wantD[i/32] || s[i/16/2*4+i/16%2] != wantS[i/16] {
				t.Fatalf("%v: number %d (%v) became %d * %v, sum %d; want %d * %v, sum %d", isa, i, x[i], q[i/32*64+i%32], d[i/32*2], s[i/16/2*4+i/16%2], wantQ[i], wantD[i/32], wantS[i/16])
			}
		}
	}
}
