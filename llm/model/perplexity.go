package model

import (
	"context"
	"math"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// PerplexityOptions say how a text is measured.
type PerplexityOptions struct {
	Tokens  []int32
	BOS     int32 // begins each chunk; -1 is none
	Chunk   int   // tokens that are read by themselves
	Limit   int   // chunks at most; 0 is all
	Numbers tensor.Type
	Sparse  tensor.Sparse
}

// Perplexity is how well a model predicts a text: e to the mean negative logarithm
// of the probability of each token.
type Perplexity struct {
	Value  float64 `json:"perplexity"`
	Tokens int     `json:"tokens"` // that were predicted
	Chunks int     `json:"chunks"`
}

// Perplexity measures a text. Of each chunk the first half is context only. It must
// not run beside Forward.
func (m *Model) Perplexity(ctx context.Context, o PerplexityOptions) (Perplexity, error) {
	const op = "model.Perplexity"
	const pageLen, most = 32, 64 // tokens of a page, tokens whose logits are kept at a time
	if o.Chunk < 4 || o.Chunk > m.config.Context || len(o.Tokens) < o.Chunk {
		return Perplexity{}, sandbox.Errorf(op, sandbox.Invalid, "", "a text of %d tokens in chunks of %d", len(o.Tokens), o.Chunk)
	}
	kv, err := cache.New(m.Layout(o.Numbers, pageLen), (o.Chunk+pageLen-1)/pageLen, cache.Key{})
	if err != nil {
		return Perplexity{}, err
	}
	defer func() { _ = kv.Close() }()
	var r Perplexity
	sum := 0.0
	for from := 0; from+o.Chunk <= len(o.Tokens) && (o.Limit <= 0 || r.Chunks < o.Limit); from += o.Chunk {
		chunk := append([]int32(nil), o.Tokens[from:from+o.Chunk]...)
		if o.BOS >= 0 {
			chunk[0] = o.BOS
		}
		seq := kv.NewSequence("")
		seq.Grow(o.Chunk)
		for at := 0; at < o.Chunk; at += most {
			n := min(most, o.Chunk-at)
			b := Batch{Tokens: chunk[at : at+n], Parts: []Part{{Pages: seq.Pages(), Start: at, Tokens: n, Last: n, Sparse: o.Sparse}}}
			if at+n < o.Chunk/2 {
				b.Parts[0].Last = 0
			}
			res, err := m.Forward(ctx, kv, &b)
			if err != nil {
				return r, err
			}
			for t := o.Chunk / 2; t < min(at+n, o.Chunk-1); t++ {
				if t >= at {
					sum += surprise(res.Logits[(t-at)*m.config.Vocab:(t-at+1)*m.config.Vocab], chunk[t+1])
					r.Tokens++
				}
			}
		}
		seq.Release()
		r.Chunks++
	}
	r.Value = math.Exp(sum / float64(r.Tokens))
	return r, nil
}

// surprise is the negative logarithm of a token's probability.
func surprise(logits []float32, token int32) float64 {
	top, sum := float32(math.Inf(-1)), 0.0
	for _, v := range logits {
		top = max(top, v)
	}
	for _, v := range logits {
		sum += math.Exp(float64(v - top))
	}
	return float64(top-logits[token]) + math.Log(sum)
}
