package tensor

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// plain is attention as it is written in books: all scores of a head, softmax, weighted sum. k and v are [tokens][kv heads][dim].
func plain(a Attention, q, k, v []float32, pos int, seen func(pos int) bool) []float32 {
	dim := a.KV.HeadDim
	out := make([]float32, a.Heads*dim)
	for h := range a.Heads {
		kv := h / (a.Heads / a.KV.Heads)
		var scores []float64
		var at []int
		for i := range pos + 1 {
			if !seen(i) || a.Window > 0 && i <= pos-a.Window {
				continue
			}
			var s float64
			for j := range dim {
				s += float64(q[h*dim+j]) * float64(k[(i*a.KV.Heads+kv)*dim+j])
			}
			s *= float64(a.Scale)
			if a.Softcap > 0 {
				s = float64(a.Softcap) * math.Tanh(s/float64(a.Softcap))
			}
			scores, at = append(scores, s), append(at, i)
		}
		var sum float64
		for _, s := range scores {
			sum += math.Exp(s)
		}
		for n, s := range scores {
			for j := range dim {
				out[h*dim+j] += float32(math.Exp(s) / sum * float64(v[(at[n]*a.KV.Heads+kv)*dim+j]))
			}
		}
	}
	return out
}

func TestAttentionIsTheSoftmaxOfScores(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 1))
	for _, typ := range []Type{F32, F16, BF16, Int8, Int4} {
		for _, a := range []Attention{
			{Heads: 8, KV: KVShape{typ, 2, 64, 16}, Scale: 0.125},
			{Heads: 3, KV: KVShape{typ, 3, 48, 32}, Scale: 0.3, Window: 21},
			{Heads: 9, KV: KVShape{typ, 3, 32, 64}, Scale: 0.2, Softcap: 3},
		} {
			if err := a.KV.Check(); err != nil {
				t.Fatal(err)
			}
			for _, isa := range append(isas(), Scalar) {
				attendBoth(t, r, a, isa)
			}
		}
	}
}

func attendBoth(t *testing.T, r *rand.Rand, a Attention, isa ISA) {
	t.Helper()
	p := NewPool(2, isa)
	defer p.Close()
	kvWidth, width := a.KV.Heads*a.KV.HeadDim, a.Heads*a.KV.HeadDim
	var sequences []Sequence
	var q, want []float32
	for i, shape := range [][2]int{{0, 1}, {0, 45}, {99, 1}, {130, 7}} { // start, tokens
		start, n := shape[0], shape[1]
		total := start + n
		k, v := numbers(r, total*kvWidth), numbers(r, total*kvWidth)
		pages := make([][]byte, (total+a.KV.PageLen-1)/a.KV.PageLen)
		for j := range pages {
			pages[j] = make([]byte, a.KV.PageBytes())
		}
		for j := range total {
			from, to := j*kvWidth, (j+1)*kvWidth
			a.KV.Store(pages[j/a.KV.PageLen], j%a.KV.PageLen, k[from:to], v[from:to])
			a.KV.Load(pages[j/a.KV.PageLen], j%a.KV.PageLen, k[from:to], v[from:to])
		}
		var sparse Sparse
		if i == 3 {
			sparse = Sparse{Near: 40, First: 3}
		}
		mine := numbers(r, n*width)
		q = append(q, mine...)
		for j := range n {
			// Whole pages, and tokens that are computed together see the same.
			group := a.Heads / a.KV.Heads
			first := start + j*group/tileRows*tileRows/group + 1 - sparse.Near
			seen := func(pos int) bool {
				return sparse.all() || pos < (sparse.First+a.KV.PageLen-1)/a.KV.PageLen*a.KV.PageLen || pos >= first/a.KV.PageLen*a.KV.PageLen
			}
			want = append(want, plain(a, mine[j*width:], k, v, start+j, seen)...)
		}
		sequences = append(sequences, Sequence{pages, start, n, sparse})
	}
	got := make([]float32, len(want))
	p.Attend(a, got, q, sequences)
	for i := range want {
		if diff := math.Abs(float64(got[i] - want[i])); !(diff < 2e-5) {
			t.Fatalf("%v %+v: number %d is %v, want %v", isa, a, i, got[i], want[i])
		}
	}
}

// What is chosen by bounds are the pages that have most to say, whatever the numbers are kept as; with a page for each of them
// nothing is lost.
func TestPagesAreChosenByWhatTheirKeysMaySay(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 1))
	for _, isa := range append(isas(), Scalar) {
		p := NewPool(1, isa)
		defer p.Close()
		a := Attention{Heads: 2, KV: KVShape{Int8, 1, 32, 16}, Scale: 1}
		const pages, needle = 40, 17
		s := Sequence{Start: pages*a.KV.PageLen - 1, Tokens: 1, Sparse: Sparse{Near: 16, First: 16, Pages: 1}}
		q, width := numbers(r, 2*32), 32
		for i := range pages {
			k, v := numbers(r, 16*width), numbers(r, 16*width)
			if i == needle { // one key that the second head asks for
				for j := range width {
					k[5*width+j], v[5*width+j] = 4*q[width+j], float32(100+j)
				}
			}
			s.Pages = append(s.Pages, make([]byte, a.KV.PageBytes()))
			a.KV.Store(s.Pages[i], 0, k, v)
		}
		got, all := make([]float32, 64), make([]float32, 64)
		p.Attend(a, got, q, []Sequence{s})
		for i, x := range got[width:] {
			if math.Abs(float64(x)-float64(100+i)) > 3 {
				t.Fatalf("%v: number %d is %v", isa, i, x)
			}
		}
		s.Sparse.Pages = pages
		p.Attend(a, got, q, []Sequence{s})
		s.Sparse = Sparse{}
		p.Attend(a, all, q, []Sequence{s})
		if fmt.Sprint(got) != fmt.Sprint(all) {
			t.Errorf("%v: with all pages chosen %v, want %v", isa, got, all)
		}
	}
}

// Rounding loses little: the mean error of normally distributed numbers, and of ones of which a few are huge.
func TestRoundedPagesLoseLittle(t *testing.T) {
	r := rand.New(rand.NewPCG(12, 1))
	for typ, most := range map[Type]float64{Int8: 0.01, Int4: 0.105} {
		for _, huge := range []float32{1, 30} {
			s := KVShape{typ, 2, 64, 32}
			page, lost, all := make([]byte, s.PageBytes()), 0.0, 0.0
			for slot := range s.PageLen {
				k, v := make([]float32, 128), make([]float32, 128)
				for i := range k {
					k[i], v[i] = float32(r.NormFloat64()), float32(r.NormFloat64())
				}
				k[7], k[70] = k[7]*huge, k[70]*huge
				s.Store(page, slot, k, v)
				a, b := make([]float32, 128), make([]float32, 128)
				s.Load(page, slot, a, b)
				for i := range k {
					lost += math.Pow(float64(a[i]-k[i]), 2) + math.Pow(float64(b[i]-v[i]), 2)
					all += math.Pow(float64(k[i]), 2) + math.Pow(float64(v[i]), 2)
				}
			}
			if e := math.Sqrt(lost / all); e > most {
				t.Errorf("%v with outliers of %v: %.4f is lost", typ, huge, e)
			} else {
				t.Logf("measured: L5 %v with outliers of %v: %.4f of the norm is lost in %d bits a number", typ, huge, e, s.bits())
			}
		}
	}
}

func TestRowsAreComputedAlikeByAll(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 1))
	for _, n := range []int{1, 7, 8, 64, 1003} {
		x, y := numbers(r, n), numbers(r, n)
		for i := range x {
			x[i] *= 10
		}
		x[0] = -200 // its exponential is no number that there is
		outputs := func(isa ISA) map[string][]float32 {
			silu, gelu, both, sum := make([]float32, n), make([]float32, n), make([]float32, n), append([]float32{}, y...)
			siluMul(isa, silu, x, y)
			geluMul(isa, gelu, x, y)
			scaledMul(isa, both, x, y, 0.7)
			add(isa, sum, x)
			scale(isa, sum, 1.5)
			e := append([]float32{}, x...)
			total := expSum(isa, e, largest(isa, e))
			half := make([]byte, 2*n)
			for i, v := range y {
				putHalf(half[2*i:], v)
			}
			scaled := append([]float32{}, y...)
			mulHalf(isa, scaled, half)
			return map[string][]float32{"half": scaled, "dot": {dotHalf(isa, half, y)}, "silu": silu, "gelu": gelu, "mul": both, "add": sum, "exp": e, "sums": {total, squares(isa, x), largest(isa, x)}}
		}
		want := outputs(Scalar)
		for _, isa := range isas() {
			for name, got := range outputs(isa) {
				for i, w := range want[name] {
					if diff := math.Abs(float64(got[i] - w)); !(diff <= 2e-5*math.Abs(float64(w))+1e-30) {
						t.Errorf("%v %s of %d: number %d is %v, want %v", isa, name, n, i, got[i], w)
					}
				}
			}
		}
	}
}

func TestRotationsTurnPairsByTheirAngles(t *testing.T) {
	angles := make([]float32, 4)
	Angles(angles, []float32{1, 0.5}, 3, 1)
	for i, want := range []float64{math.Cos(3), math.Cos(1.5), math.Sin(3), math.Sin(1.5)} {
		if math.Abs(float64(angles[i])-want) > 1e-6 {
			t.Errorf("angle %d is %v, want %v", i, angles[i], want)
		}
	}
	halves, pairs := []float32{1, 2, 3, 4, 9}, []float32{1, 3, 2, 4, 9}
	RotateHalves(halves, 5, angles)
	RotatePairs(pairs, 5, angles)
	c, s := angles[:2], angles[2:]
	want := []float32{1*c[0] - 3*s[0], 2*c[1] - 4*s[1], 1*s[0] + 3*c[0], 2*s[1] + 4*c[1], 9}
	if fmt.Sprint(halves) != fmt.Sprint(want) {
		t.Errorf("halves are %v, want %v", halves, want)
	}
	if fmt.Sprint(pairs) != fmt.Sprint([]float32{want[0], want[2], want[1], want[3], 9}) {
		t.Errorf("pairs are %v, want those of %v", pairs, want)
	}
}
