package tensor

import "math"

// An Attention is what the layers of a model have in common.
type Attention struct {
	KV      KVShape
	Heads   int     // query heads, a multiple of KV.Heads; as many in a row share a key head
	Scale   float32 // of the products of query and key
	Window  int     // how many positions a token sees, its own included; 0 means all before it
	Softcap float32 // see Softcap; 0 means none
}

// A Sequence is consecutive tokens of one stream, whose keys and values are in Pages already. Page i holds positions
// i*PageLen and on; a nil page is not attended to.
type Sequence struct {
	Pages  [][]byte
	Start  int // position of the first token that asks
	Tokens int // how many ask
}

// Attend writes, for each token of each sequence in turn, what its heads gather: dst and q are [tokens][Heads][HeadDim].
func (p *Pool) Attend(a Attention, dst, q []float32, sequences []Sequence) {
	type ask struct{ seq, token, row int }
	var asks []ask
	for i, s := range sequences {
		for t := range s.Tokens {
			asks = append(asks, ask{i, t, len(asks)})
		}
	}
	width := a.Heads * a.KV.HeadDim
	p.Run(len(asks), 1, func(lo, hi int) {
		for _, k := range asks[lo:hi] {
			s := sequences[k.seq]
			at := k.row * width
			a.attendScalar(dst[at:at+width], q[at:at+width], s.Pages, s.Start+k.token)
		}
	})
}

// attendScalar is what attention means, for the token at pos.
func (a Attention) attendScalar(dst, q []float32, pages [][]byte, pos int) {
	dim := a.KV.HeadDim
	k, v := make([]float32, a.KV.Heads*dim), make([]float32, a.KV.Heads*dim)
	top, sum := make([]float32, a.Heads), make([]float32, a.Heads)
	for h := range top {
		top[h] = float32(math.Inf(-1))
	}
	clear(dst)
	first := 0
	if a.Window > 0 {
		first = max(0, pos-a.Window+1)
	}
	for i := first; i <= pos; i++ {
		page := pages[i/a.KV.PageLen]
		if page == nil {
			continue
		}
		a.KV.Load(page, i%a.KV.PageLen, k, v)
		for h := range a.Heads {
			from := h / (a.Heads / a.KV.Heads) * dim
			out := dst[h*dim : (h+1)*dim]
			var score float32
			for j, x := range q[h*dim : (h+1)*dim] {
				score += x * k[from+j]
			}
			score *= a.Scale
			if a.Softcap > 0 {
				score = a.Softcap * tanh(score/a.Softcap)
			}
			if score > top[h] { // what is there was weighed against a smaller maximum
				old := exp(top[h] - score)
				Scale(out, old)
				sum[h] *= old
				top[h] = score
			}
			weight := exp(score - top[h])
			sum[h] += weight
			for j := range out {
				out[j] += weight * v[from+j]
			}
		}
	}
	for h := range a.Heads {
		if sum[h] > 0 {
			Scale(dst[h*dim:(h+1)*dim], 1/sum[h])
		}
	}
}
