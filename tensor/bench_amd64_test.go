package tensor

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// BenchmarkMatVec streams weights that no cache holds.
func BenchmarkMatVec(b *testing.B) {
	benchmark(b, 16384, 4096, []int{1})
}

func BenchmarkMatMul(b *testing.B) {
	benchmark(b, 2048, 4096, []int{8, 256})
}

// BenchmarkCached multiplies what the caches hold.
func BenchmarkCached(b *testing.B) {
	benchmark(b, 64, 1024, []int{64})
}

func benchmark(b *testing.B, rows, cols int, tokens []int) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, typ := range []Type{Q4_0, Q8_0, Q4_K, Q6_K, F16, BF16, F32, Q5_0, Q5_K, Q3_K, IQ4_XS} {
		m := pack(b, Shape{typ, rows, cols}, weights(b, r, typ, rows*cols))
		for _, n := range tokens {
			x := numbers(r, n*cols)
			dst := make([]float32, n*rows)
			for _, isa := range isas() {
				for _, threads := range []int{1, 2} {
					b.Run(fmt.Sprintf("%v/%v/tokens=%d/threads=%d", typ, isa, n, threads), func(b *testing.B) {
						p := NewPool(threads, isa)
						defer p.Close()
						var in Input
						b.SetBytes(int64(m.Bytes()))
						for b.Loop() {
							in.Set(x, n, cols, Range{0, n / 16 * 16})
							p.MatMul(&in, Product{W: m, Dst: dst})
						}
						b.ReportMetric(2*float64(rows)*float64(cols)*float64(n)*float64(b.N)/b.Elapsed().Seconds()/1e9, "GOPS")
					})
				}
			}
		}
	}
}

func BenchmarkSweep(b *testing.B) {
	mem, err := Alloc(256 << 20)
	if err != nil {
		b.Fatal(err)
	}
	defer mem.Free()
	for i := range mem.Bytes() {
		mem.Bytes()[i] = 1
	}
	for _, threads := range []int{1, 2} {
		b.Run(fmt.Sprint("threads=", threads), func(b *testing.B) {
			p := NewPool(threads, AVX2)
			defer p.Close()
			b.SetBytes(256 << 20)
			for b.Loop() {
				p.Sweep(mem.Bytes())
			}
		})
	}
}
