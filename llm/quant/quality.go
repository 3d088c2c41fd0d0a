package quant

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// Logits computes what a model thinks of each next token of a text:
// [len(tokens)][vocabulary]. The result is valid until the next call.
type Logits func(ctx context.Context, tokens []int32) ([]float32, error)

// A Quality says how well a model predicts held-out text, and how far from another
// model it is in doing so.
type Quality struct {
	Tokens     int     // that were predicted
	Perplexity float64 // the lower the better
	Base       float64 // perplexity of the model that it is compared with; 0: of none
	Divergence float64 // mean Kullback-Leibler divergence from that model, in nats
	Agreement  float64 // how often both find the same token likeliest, 0 to 1
}

// Measure cuts tokens into windows and predicts the second half of each from all
// before it. base may be nil. begin is put before each window, unless it is negative.
// Errors are Invalid for too little text, and those of the models.
func Measure(ctx context.Context, tokens []int32, window int, begin int32, model, base Logits) (Quality, error) {
	var q Quality
	if window < 4 || len(tokens) < window {
		return q, fmt.Errorf("%d tokens are less than a window of %d", len(tokens), window)
	}
	var surprise, baseSurprise float64
	agreed := 0
	buffer := make([]int32, 0, window+1)
	for ; len(tokens) >= window; tokens = tokens[window:] {
		text := buffer[:0]
		if begin >= 0 {
			text = append(text, begin)
		}
		text = append(text, tokens[:window]...)
		got, err := model(ctx, text)
		if err != nil {
			return q, err
		}
		vocab := len(got) / len(text)
		var want []float32
		if base != nil {
			if want, err = base(ctx, text); err != nil {
				return q, err
			}
			if len(want) != len(got) {
				return q, errors.New("the models have vocabularies of different sizes")
			}
		}
		for i := len(text) / 2; i < len(text)-1; i++ {
			next := int(text[i+1])
			row := got[i*vocab : (i+1)*vocab]
			norm, top := logSum(row)
			surprise += norm - float64(row[next])
			q.Tokens++
			if base == nil {
				continue
			}
			baseRow := want[i*vocab : (i+1)*vocab]
			baseNorm, baseTop := logSum(baseRow)
			baseSurprise += baseNorm - float64(baseRow[next])
			if top == baseTop {
				agreed++
			}
			for t, v := range baseRow {
				p := float64(v) - baseNorm
				if p > -30 {
					q.Divergence += math.Exp(p) * (p - float64(row[t]) + norm)
				}
			}
		}
	}
	n := float64(q.Tokens)
	q.Perplexity = math.Exp(surprise / n)
	if base != nil {
		q.Base, q.Divergence, q.Agreement = math.Exp(baseSurprise/n), q.Divergence/n, float64(agreed)/n
	}
	if math.IsNaN(q.Perplexity) {
		return q, errors.New("the model's answers are not numbers")
	}
	return q, nil
}

// logSum returns the logarithm of the sum of exponentials, and where the largest is.
func logSum(x []float32) (sum float64, top int) {
	for i, v := range x {
		if v > x[top] {
			top = i
		}
	}
	for _, v := range x {
		sum += math.Exp(float64(v - x[top]))
	}
	return math.Log(sum) + float64(x[top]), top
}
