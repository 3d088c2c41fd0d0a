package tensor

import (
	"math"
	"math/rand/v2"
	"testing"
)

// weights returns n numbers as models have them, in the layout of t: random blocks, of which some are all zeros.
func weights(tb testing.TB, r *rand.Rand, t Type, n int) []byte {
	tb.Helper()
	b := make([]byte, t.Bytes(n))
	for at := 0; at < len(b); at += t.BlockBytes() {
		randomBlock(r, t, b[at:at+t.BlockBytes()])
	}
	return b
}

// randomBlock fills all bits with chance and sets the scales to what is usual.
func randomBlock(r *rand.Rand, t Type, b []byte) {
	half := func(at int) { putHalf(b[at:], float32(r.NormFloat64())*0.01) }
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	switch t {
	case F32:
		encoders[F32](b, []float32{float32(r.NormFloat64())})
	case F16, BF16:
		encoders[t](b, []float32{float32(r.NormFloat64())})
	case F8_E4M3, F8_E5M2:
		x := make([]float32, 64)
		for i := range x {
			x[i] = float32(r.NormFloat64())
		}
		encoders[t](b, x)
	case Q3_0, Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS:
		half(0)
	case Q3_1, Q4_1, Q5_1, Q4_K, Q5_K:
		half(0)
		half(2)
	case Q2_K:
		half(80)
		half(82)
	case Q3_K:
		half(108)
	case Q6_K:
		half(208)
	}
	if r.IntN(16) == 0 {
		clear(b)
	}
}

func types() []Type {
	return []Type{F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, Q3_0, Q3_1, F8_E4M3, F8_E5M2}
}

func numbers(r *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return x
}

// pack makes a matrix of src in fresh memory, which lives as long as the test.
func pack(tb testing.TB, s Shape, src []byte) Matrix {
	tb.Helper()
	n, err := s.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	mem, err := Alloc(n)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { mem.Free() })
	m, err := Pack(s, mem.Bytes(), src)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func TestPackedRowsAreTheRowsThatWerePacked(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, typ := range types() {
		const rows, cols = 37, 512
		src := weights(t, r, typ, rows*cols)
		want := make([]float32, rows*cols)
		if err := Dequantise(want, typ, src); err != nil {
			t.Fatal(err)
		}
		m := pack(t, Shape{typ, rows, cols}, src)
		got := make([]float32, cols)
		for i := range rows {
			m.Row(got, i)
			for j := range got {
				if got[j] != want[i*cols+j] {
					t.Fatalf("%v: row %d column %d is %v, want %v", typ, i, j, got[j], want[i*cols+j])
				}
			}
		}
		m.SliceRows(16, 37).SliceCols(256, 512).Row(got[:256], 3)
		if got[7] != want[19*cols+256+7] {
			t.Errorf("%v: a slice has other numbers than its part of the whole", typ)
		}
	}
}

func TestQuantisedNumbersComeBackNear(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 1))
	x := numbers(r, 4096)
	// Root mean square error over that of the numbers, as the bits allow.
	limits := map[Type]float64{F32: 0, F16: 3e-4, BF16: 2e-3, Q8_0: 0.007, Q4_0: 0.1, Q4_1: 0.09, Q5_0: 0.05, Q5_1: 0.045, Q4_K: 0.075, Q6_K: 0.02}
	for typ, limit := range limits {
		b, back := make([]byte, typ.Bytes(len(x))), make([]float32, len(x))
		if err := Quantise(b, typ, x); err != nil {
			t.Fatal(err)
		}
		if err := Dequantise(back, typ, b); err != nil {
			t.Fatal(err)
		}
		var err, all float64
		for i := range x {
			err += float64(x[i]-back[i]) * float64(x[i]-back[i])
			all += float64(x[i]) * float64(x[i])
		}
		if e := math.Sqrt(err / all); e > limit {
			t.Errorf("%v: error %.4f, limit %.4f", typ, e, limit)
		} else {
			t.Logf("%v: error %.5f", typ, e)
		}
	}
}

func TestProductsAreSumsOfRowTimesColumn(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	p := NewPool(2, Scalar)
	defer p.Close()
	const rows, cols, tokens = 40, 256, 3
	x := numbers(r, tokens*cols)
	for _, typ := range types() {
		src := weights(t, r, typ, rows*cols)
		m := pack(t, Shape{typ, rows, cols}, src)
		w := make([]float32, rows*cols)
		if err := Dequantise(w, typ, src); err != nil {
			t.Fatal(err)
		}
		var in Input
		in.Set(x, tokens, cols)
		got := make([]float32, tokens*rows)
		p.MatMul(&in, Product{W: m, Dst: got})
		p.MatMul(&in, Product{W: m.SliceRows(16, 40), Dst: got[16:], Stride: rows, Add: true})
		for tok := range tokens {
			for i := range rows {
				var sum, size float64
				for c := range cols {
					v := float64(w[i*cols+c]) * float64(x[tok*cols+c])
					sum, size = sum+v, size+v*v
				}
				if i >= 16 {
					sum *= 2
				}
				if diff := math.Abs(sum - float64(got[tok*rows+i])); diff > 0.05*math.Sqrt(size)+1e-6 {
					t.Fatalf("%v: token %d row %d is %v, want %v", typ, tok, i, got[tok*rows+i], sum)
				}
			}
		}
	}
}
