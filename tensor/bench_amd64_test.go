package tensor

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
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

// BenchmarkFromMemory holds one token and eight against the fastest reading of the same memory, taking turns over pieces that
// no cache holds. The fastest of each counts, since other work on the machine only ever makes slower.
func BenchmarkFromMemory(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 3))
	const cols, size, piece = 2048, 128 << 20, 4 << 20
	for _, typ := range []Type{Q4_0, Q8_0, Q4_K, Q6_K, F16, BF16} {
		row := typ.Bytes(cols)
		rows, part := size/row/Lanes*Lanes, piece/row/Lanes*Lanes
		mem, err := Alloc(rows * row)
		if err != nil {
			b.Fatal(err)
		}
		m, err := NewMatrix(Shape{typ, rows, cols}, mem.Bytes())
		if err != nil {
			b.Fatal(err)
		}
		few := weights(b, r, typ, Lanes*cols)
		for at := 0; at < rows; at += Lanes {
			if err := m.PackRows(at, few); err != nil {
				b.Fatal(err)
			}
		}
		dst := make([]float32, 8*rows)
		for _, threads := range []int{1, 2} {
			b.Run(fmt.Sprintf("%v/threads=%d", typ, threads), func(b *testing.B) {
				p := NewPool(threads, Best())
				defer p.Close()
				var one, eight Input
				one.Set(numbers(r, cols), 1, cols)
				eight.Set(numbers(r, 8*cols), 8, cols)
				var best [3]time.Duration
				turn := 0
				for b.Loop() {
					for at := 0; at+part <= rows; at, turn = at+part, turn+1 {
						w, start := m.SliceRows(at, at+part), time.Now()
						switch turn % 3 {
						case 0:
							p.Sweep(w.data[:w.Bytes()&^255])
						case 1:
							p.MatMul(&one, Product{W: w, Dst: dst})
						case 2:
							p.MatMul(&eight, Product{W: w, Dst: dst})
						}
						if d := time.Since(start); best[turn%3] == 0 || d < best[turn%3] {
							best[turn%3] = d
						}
					}
				}
				read := float64(part * row)
				b.ReportMetric(read/float64(best[0].Nanoseconds()), "GB/s-ceiling")
				b.ReportMetric(float64(best[0])/float64(best[1]), "one/ceiling")
				b.ReportMetric(8*float64(best[1])/float64(best[2]), "eight/one")
			})
		}
		if err := mem.Free(); err != nil {
			b.Fatal(err)
		}
	}
}
