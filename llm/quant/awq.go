package quant

import (
	"fmt"
	"math"
	"slices"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/tensor"
)

// A link is matrices that take the same input, and what produces it: when columns of
// the former are multiplied by a factor, rows of the latter are divided by it.
type link struct {
	takers   []string
	producer string // a norm's weights, or a matrix
	input    string // the name under which the inputs were seen
	shared   bool   // inputs of the heads that share a value have one factor
}

// links are those of a layer, in an order in which a matrix is scaled by its rows
// before its own rounding.
var links = []link{
	{takers: []string{"attn_q", "attn_k", "attn_v"}, producer: "attn_norm", input: "attn_q"},
	{takers: []string{"attn_output"}, producer: "attn_v", input: "attn_output", shared: true},
	{takers: []string{"ffn_gate", "ffn_up"}, producer: "ffn_norm", input: "ffn_gate"},
	{takers: []string{"ffn_down"}, producer: "ffn_up", input: "ffn_down"},
}

// awq scales the weights of a layer, by name, in place, and returns for each matrix
// how much its inputs then count.
func (j *job) awq(prefix string, weights map[string][]float32, tensors map[string]*gguf.Tensor) error {
	heads, kvHeads := j.heads()
	for _, l := range links {
		s := j.stats[prefix+l.input+".weight"]
		if s == nil || tensors[prefix+l.producer+".weight"] == nil {
			continue
		}
		group := 1 // inputs that share a producer's row lie headDim apart
		headDim := s.cols
		if l.shared {
			if heads == 0 || kvHeads == 0 || heads%kvHeads != 0 || s.cols%heads != 0 {
				continue
			}
			group, headDim = heads/kvHeads, s.cols/heads
		}
		size := fold(s, group, headDim)
		factors, err := j.search(l, prefix, weights, s, size, func(i int) int { return producerOf(i, group, headDim) })
		if err != nil {
			return err
		}
		if factors == nil {
			continue
		}
		for _, name := range l.takers {
			w := weights[prefix+name+".weight"]
			for i := range w {
				w[i] *= factors[producerOf(i%s.cols, group, headDim)]
			}
		}
		divideRows(weights[prefix+l.producer+".weight"], factors)
		if bias := weights[prefix+l.producer+".bias"]; bias != nil {
			divideRows(bias, factors)
		}
		for i := range s.square {
			f := float64(factors[producerOf(i, group, headDim)])
			s.square[i] /= f * f
			s.abs[i] /= f
		}
	}
	return nil
}

// producerOf returns the row that produces input i: heads of queries take turns in
// groups that share a value.
func producerOf(i, group, headDim int) int {
	if group == 1 {
		return i
	}
	return i/headDim/group*headDim + i%headDim
}

// fold returns the mean size of what each producing row gives.
func fold(s *stat, group, headDim int) []float64 {
	out := make([]float64, s.cols/group)
	for i, v := range s.abs {
		out[producerOf(i, group, headDim)] += v / float64(s.tokens*group)
	}
	return out
}

// divideRows divides rows, of which there are as many as factors.
func divideRows(w, factors []float32) {
	cols := len(w) / len(factors)
	for i := range w {
		w[i] /= factors[i/cols]
	}
}

// search finds the power of the inputs' sizes with which factors make the least error.
// No scaling at all is among them; then it returns nil.
func (j *job) search(l link, prefix string, weights map[string][]float32, s *stat, size []float64, producer func(int) int) ([]float32, error) {
	var chosen []float32
	least := math.Inf(1)
	for step := range 11 {
		power := float64(step) / 10
		factors := make([]float32, len(size))
		low, high := math.Inf(1), 0.0
		for i, v := range size {
			f := math.Pow(max(v, 1e-5), power)
			factors[i] = float32(f)
			low, high = min(low, f), max(high, f)
		}
		for i := range factors {
			factors[i] /= float32(math.Sqrt(low * high))
		}
		sum := 0.0
		for _, name := range l.takers {
			w := weights[prefix+name+".weight"]
			if w == nil || len(w)%s.cols != 0 {
				return nil, fmt.Errorf("%s%s takes other inputs than were seen", prefix, name)
			}
			e, err := j.scaledError(w, s, factors, producer)
			if err != nil {
				return nil, err
			}
			sum += e
		}
		if sum < least {
			if least, chosen = sum, factors; step == 0 {
				chosen = nil
			}
		}
	}
	return chosen, nil
}

// scaledError estimates what rounding does to outputs when columns are scaled first: the
// sum of the squared errors of weights, each by the mean square of its input. Errors of
// rounding are as good as independent, so that nothing else counts.
func (j *job) scaledError(w []float32, s *stat, factors []float32, producer func(int) int) (float64, error) {
	cols := s.cols
	// A part of the rows is enough to choose by.
	stride := max(1, len(w)/cols/256)
	rows := 0
	sample := []float32{}
	for r := 0; r < len(w)/cols; r += stride {
		sample = append(sample, w[r*cols:(r+1)*cols]...)
		rows++
	}
	scaled := slices.Clone(sample)
	importance := s.importance()
	for i := range importance {
		f := factors[producer(i)]
		importance[i] /= f * f
	}
	for i := range scaled {
		scaled[i] *= factors[producer(i%cols)]
	}
	raw, err := j.recipe.Format.rtn(j.pool, scaled, cols, nil)
	if err != nil {
		return 0, err
	}
	back := make([]float32, len(scaled))
	if err := tensor.Dequantise(back, j.recipe.Format.Type, raw); err != nil {
		return 0, err
	}
	sum := 0.0
	for i := range back {
		e := float64(back[i] - scaled[i])
		sum += e * e * float64(importance[i%cols])
	}
	return sum * float64(stride), nil
}

// heads returns how many heads queries and values have; 0 if the file does not say.
func (j *job) heads() (heads, kvHeads int) {
	arch := j.src.Architecture()
	h, _ := j.src.Meta.Int(arch + ".attention.head_count")
	kv, ok := j.src.Meta.Int(arch + ".attention.head_count_kv")
	if !ok {
		kv = h
	}
	if h < 1 || kv < 1 || h > 1<<16 || kv > h {
		return 0, 0
	}
	return int(h), int(kv)
}
