package model

import (
	"math"

	"github.com/atoll-run/atoll/sandbox"
)

// scaling stretches RoPE to contexts longer than those of the training.
type scaling struct {
	kind    string // none, linear, llama3, yarn
	factor  float64
	context int     // tokens of the original training
	low     float64 // llama3: turns in the original context below which all is stretched
	high    float64 // llama3: turns above which nothing is
	slow    float64 // yarn: turns below which all is stretched; 0 is 1
	fast    float64 // yarn: turns above which nothing is; 0 is 32
	attn    float64 // yarn: the magnitude; 0 is what the method says
}

// rope computes the frequencies for dim numbers of each head.
func (s scaling) rope(dim int, base float64) (Rope, error) {
	r := Rope{Freq: make([]float32, dim/2), Magnitude: 1}
	if s.kind != "none" && s.kind != "default" && s.kind != "" && !(s.factor > 0) {
		return r, sandbox.Errorf("model.rope", sandbox.Invalid, s.kind, "RoPE scaled by %v", s.factor)
	}
	var stretched func(freq float64, pair int) float64
	switch s.kind {
	case "none", "default", "":
		stretched = func(freq float64, _ int) float64 { return freq }
	case "linear":
		stretched = func(freq float64, _ int) float64 { return freq / s.factor }
	case "llama3":
		if !(s.high > s.low) || s.context < 1 {
			return r, sandbox.Errorf("model.rope", sandbox.Invalid, s.kind, "RoPE factors from %v to %v over %d tokens", s.low, s.high, s.context)
		}
		stretched = func(freq float64, _ int) float64 {
			turns := float64(s.context) * freq / (2 * math.Pi)
			keep := min(1, max(0, (turns-s.low)/(s.high-s.low)))
			return keep*freq + (1-keep)*freq/s.factor
		}
	case "yarn":
		if s.context < 1 {
			return r, sandbox.Errorf("model.rope", sandbox.Invalid, s.kind, "no original context")
		}
		stretched = s.yarn(dim, base)
		r.Magnitude = float32(0.1*math.Log(s.factor) + 1)
		if s.attn > 0 {
			r.Magnitude = float32(s.attn)
		}
	default:
		return r, sandbox.Errorf("model.rope", sandbox.Unsupported, s.kind, "RoPE scaling %q is not known", s.kind)
	}
	for i := range r.Freq {
		r.Freq[i] = float32(stretched(math.Pow(base, -2*float64(i)/float64(dim)), i))
	}
	return r, nil
}

// yarn stretches pairs by how often they turn in the original context, with a
// ramp, over the numbers of the pairs, between those that do often and seldom.
func (s scaling) yarn(dim int, base float64) func(freq float64, pair int) float64 {
	slow, fast := s.slow, s.fast
	if slow == 0 {
		slow = 1
	}
	if fast == 0 {
		fast = 32
	}
	at := func(turns float64) float64 { // the pair that turns so often
		return float64(dim) * math.Log(float64(s.context)/(turns*2*math.Pi)) / (2 * math.Log(base))
	}
	first, last := max(0, math.Floor(at(fast))), min(float64(dim-1), math.Ceil(at(slow)))
	return func(freq float64, pair int) float64 {
		keep := 1 - min(1, max(0, (float64(pair)-first)/max(0.001, last-first)))
		return keep*freq + (1-keep)*freq/s.factor
	}
}
