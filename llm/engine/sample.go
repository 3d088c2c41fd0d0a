package engine

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/atoll-run/atoll/llm/grammar"
)

// Sampling says how a token is chosen from what the model thinks of each. The
// zero value takes the likeliest.
type Sampling struct {
	Temperature float32 // 0 takes the likeliest
	TopK        int     // only the likeliest so many; 0 is all
	TopP        float32 // only the likeliest that together have this probability; 0 and 1 are all
	MinP        float32 // only those at least this likely, as a part of the likeliest
	Repetition  float32 // divides what is positive, multiplies what is negative, for tokens seen lately; 0 and 1 do nothing
	Frequency   float32 // subtracted for each time that a token was generated
	Presence    float32 // subtracted once for a token that was generated
	Bias        map[int32]float32
	Seed        uint64
}

// repetitionWindow is how many of the latest tokens Repetition looks at.
const repetitionWindow = 64

// A sampler chooses the tokens of one sequence. Two with the same settings choose
// alike from the same logits.
type sampler struct {
	Sampling
	rnd    *rand.Rand
	counts map[int32]int // generated tokens
	heap   []candidate   // kept between calls
}

type candidate struct {
	token int32
	value float32 // a logit, then a probability
}

func newSampler(s Sampling) *sampler {
	return &sampler{Sampling: s, rnd: rand.New(rand.NewPCG(s.Seed, 0x9e3779b97f4a7c15)), counts: map[int32]int{}}
}

// note counts a token that was generated.
func (s *sampler) note(token int32) { s.counts[token]++ }

// choose returns a token, among those of mask when it is not nil. It changes
// logits. recent are the tokens before, latest last. -1 means that the mask is
// empty.
func (s *sampler) choose(logits []float32, mask grammar.Mask, recent []int32) int32 {
	return s.draw(s.distribution(logits, mask, recent))
}

// distribution returns the tokens that may be chosen with their probabilities; none when the mask is empty. It changes logits. The
// result is valid until the next call.
func (s *sampler) distribution(logits []float32, mask grammar.Mask, recent []int32) []candidate {
	s.penalise(logits, recent)
	if mask != nil {
		for i := range logits {
			if !mask.Has(int32(i)) { // a vocabulary is far below 2^31
				logits[i] = float32(math.Inf(-1))
			}
		}
	}
	best := likeliest(logits)
	if best < 0 {
		return nil
	}
	if s.Temperature <= 0 {
		s.heap = append(s.heap[:0], candidate{best, 1})
		return s.heap
	}
	list := s.keep(logits, logits[best])
	total := 0.0
	for _, c := range list {
		total += float64(c.value)
	}
	for i := range list {
		list[i].value = float32(float64(list[i].value) / total)
	}
	return list
}

// draw chooses one of list by its weights, -1 when there is none.
func (s *sampler) draw(list []candidate) int32 {
	if len(list) < 2 {
		if len(list) == 0 {
			return -1
		}
		return list[0].token
	}
	total := 0.0
	for _, c := range list {
		total += float64(c.value)
	}
	at := s.rnd.Float64() * total
	for _, c := range list {
		if at -= float64(c.value); at < 0 {
			return c.token
		}
	}
	return list[0].token
}

// verify chooses a token as choose does, given one that was drawn from d.from. It takes that as often as it can without changing
// how likely each token is (speculative sampling, Leviathan et al. 2023): with the probability by which both distributions give it;
// otherwise it draws from what is left of the one when the other is taken away.
func (s *sampler) verify(logits []float32, recent []int32, d draft) int32 {
	list := s.distribution(logits, nil, recent)
	if d.from == nil || len(list) == 0 {
		return s.draw(list)
	}
	if s.rnd.Float64()*weight(d.from, d.token) < weight(list, d.token) {
		return d.token
	}
	taken := make(map[int32]float32, len(d.from))
	for _, c := range d.from {
		taken[c.token] = c.value
	}
	left := list[:0]
	for _, c := range list {
		if c.value -= taken[c.token]; c.value > 0 {
			left = append(left, c)
		}
	}
	if len(left) == 0 { // the two are the same, but for rounding
		return d.token
	}
	return s.draw(left)
}

// weight is what list has of a token.
func weight(list []candidate, token int32) float64 {
	for _, c := range list {
		if c.token == token {
			return float64(c.value)
		}
	}
	return 0
}

func (s *sampler) penalise(logits []float32, recent []int32) {
	if s.Repetition != 0 && s.Repetition != 1 {
		window := slices.Clone(recent[max(0, len(recent)-repetitionWindow):])
		slices.Sort(window)
		for _, t := range slices.Compact(window) {
			if int(t) >= len(logits) {
				continue
			}
			if logits[t] > 0 {
				logits[t] /= s.Repetition
			} else {
				logits[t] *= s.Repetition
			}
		}
	}
	if s.Frequency != 0 || s.Presence != 0 {
		for t, n := range s.counts {
			logits[t] -= s.Frequency*float32(n) + s.Presence
		}
	}
	for t, bias := range s.Bias {
		if t >= 0 && int(t) < len(logits) {
			logits[t] += bias
		}
	}
}

// likeliest returns the token of the highest logit, the first of equals; -1 when
// all are minus infinity or not numbers.
func likeliest(logits []float32) int32 {
	best, value := int32(-1), float32(math.Inf(-1))
	for i, v := range logits {
		if v > value {
			best, value = int32(i), v
		}
	}
	return best
}

// keep returns the tokens that the settings leave, with weights proportional to
// their probabilities, likeliest first where there was a need to order them.
func (s *sampler) keep(logits []float32, highest float32) []candidate {
	relative := func(logit float32) float32 {
		return float32(math.Exp(float64((logit - highest) / s.Temperature)))
	}
	nucleus := s.TopP > 0 && s.TopP < 1
	list := s.heap[:0]
	// A token below this is less than min-p times as likely as the likeliest.
	// Without min-p, what has no weight in a float32 is left out.
	floor := highest - 87*s.Temperature
	if s.MinP > 0 {
		floor = max(floor, highest+s.Temperature*float32(math.Log(float64(s.MinP))))
	}
	for i, v := range logits {
		if v >= floor {
			list = append(list, candidate{int32(i), v})
		}
	}
	s.heap = list
	if s.TopK > 0 && s.TopK < len(list) {
		top(list, s.TopK)
		list = list[:s.TopK]
	}
	total := 0.0
	for i := range list {
		list[i].value = relative(list[i].value)
		total += float64(list[i].value)
	}
	if !nucleus {
		return list
	}
	// The nucleus is mostly small: order the top of the list further and further
	// until it is inside.
	for n := min(64, len(list)); ; n = min(8*n, len(list)) {
		top(list, n)
		sum := 0.0
		for i := range n {
			if sum += float64(list[i].value); sum >= float64(s.TopP)*total {
				return list[:i+1]
			}
		}
		if n == len(list) {
			return list
		}
	}
}

// top orders list so that its first n are the highest, descending; equals stand in
// the order of their tokens.
func top(list []candidate, n int) {
	order := func(a, b candidate) int {
		return cmp.Or(cmp.Compare(b.value, a.value), cmp.Compare(a.token, b.token))
	}
	lo, hi := 0, len(list)
	for hi-lo > 1 && n < hi { // quickselect: everything before lo is above everything from hi on
		pivot := list[lo+(hi-lo)/2]
		i, j := lo, hi-1
		for i <= j {
			for order(list[i], pivot) < 0 {
				i++
			}
			for order(list[j], pivot) > 0 {
				j--
			}
			if i <= j {
				list[i], list[j] = list[j], list[i]
				i, j = i+1, j-1
			}
		}
		if n <= j+1 {
			hi = j + 1
		} else if n > i {
			lo = i
		} else {
			break
		}
	}
	slices.SortFunc(list[:n], order)
}

// Alternative is a token with the logarithm of its probability.
type Alternative struct {
	Token   int32
	LogProb float32
}

// logProbs returns the logarithm of the probability that the model gives to
// token, before any of the settings of Sampling, and the n likeliest tokens.
func logProbs(logits []float32, token int32, n int) (float32, []Alternative) {
	best := likeliest(logits)
	if best < 0 {
		return float32(math.Inf(-1)), nil
	}
	highest, sum := float64(logits[best]), 0.0
	list := make([]candidate, len(logits))
	for i, v := range logits {
		sum += math.Exp(float64(v) - highest)
		list[i] = candidate{int32(i), v}
	}
	norm := highest + math.Log(sum)
	n = min(n, len(list))
	top(list, n)
	likely := make([]Alternative, n)
	for i := range likely {
		likely[i] = Alternative{list[i].token, float32(float64(list[i].value) - norm)}
	}
	return float32(float64(logits[token]) - norm), likely
}
