package model

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// A Needle is a fact in a long text: what is said somewhere, how it begins when it is asked for at the end, and what must follow.
type Needle struct{ Fact, Question, Answer []int32 }

// LongTextOptions say how attention in long texts is measured.
type LongTextOptions struct {
	Text     []int32 // natural text; begins anew when it is too short
	BOS      int32   // -1 is none
	Length   int     // tokens
	Needles  []Needle
	Numbers  tensor.Type
	Read     tensor.Sparse // the attention by which the text is read; the zero value is full
	Sparse   []tensor.Sparse
	Progress func(done, all int) // tokens read; may be nil
}

// LongText is how a model does with one way of attention at the end of a long text, which has been read with LongTextOptions.Read.
type LongText struct {
	Perplexity float64 `json:"perplexity"` // of tokens that go on with the text, one by one
	Found      int     `json:"found"`      // needles whose every token was the likeliest
	Surprise   float64 `json:"surprise"`   // nats: the mean negative logarithm of the probability of a needle's tokens
	Needles    int     `json:"needles"`
	Read       float64 `json:"read_tps"`  // tokens a second, reading further tokens at the end
	Write      float64 `json:"write_tps"` // tokens a second, one by one
}

const (
	tailTokens = 96  // judged one by one
	readTokens = 256 // read together
	readChunk  = 256 // tokens of a pass while the text is read
	longPage   = 32  // tokens of a page
)

// LongText reads a text of o.Length tokens with needles spread over it, once, and then for each way of attention: asks for each
// needle, judges what follows, and reads on. It also returns how many tokens a second were read at first. It must not run beside Forward.
func (m *Model) LongText(ctx context.Context, o LongTextOptions) (list []LongText, first float64, err error) {
	const op = "model.LongText"
	more := readTokens
	for _, n := range o.Needles {
		more = max(more, len(n.Question)+len(n.Answer))
	}
	if len(o.Text) < 1 || o.Length < 16*longPage || o.Length > maxContext {
		return nil, 0, sandbox.Errorf(op, sandbox.Invalid, "", "a text of %d tokens to be made of %d", o.Length, len(o.Text))
	}
	kv, err := cache.New(m.Layout(o.Numbers, longPage), (o.Length+more)/longPage+1, cache.Key{})
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = kv.Close() }()
	r := &longReader{m: m, kv: kv, seq: kv.NewSequence(""), o: &o}
	text, tail := o.compose(max(tailTokens, readTokens))
	r.seq.Grow(len(text) + more)
	began := time.Now()
	for at := 0; at < len(text); at += readChunk {
		n := min(readChunk, len(text)-at)
		if _, err := r.pass(ctx, at, text[at:at+n], 0, o.Read); err != nil {
			return nil, 0, err
		}
		if o.Progress != nil {
			o.Progress(at+n, len(text))
		}
	}
	first = float64(len(text)) / time.Since(began).Seconds()
	for _, sparse := range o.Sparse {
		l, err := r.judge(ctx, len(text), tail, sparse)
		if err != nil {
			return nil, 0, err
		}
		list = append(list, l)
	}
	return list, first, nil
}

// compose returns the text with its needles, evenly spread, and what follows it.
func (o *LongTextOptions) compose(more int) (text, tail []int32) {
	if o.BOS >= 0 {
		text = append(text, o.BOS)
	}
	at, facts := 0, 0
	for _, n := range o.Needles {
		facts += len(n.Fact)
	}
	plain := o.Length - len(text) - facts // tokens of natural text
	next := func() (token int32) {
		token = o.Text[at%len(o.Text)]
		at++
		return token
	}
	for i, n := range o.Needles {
		for at < plain*(2*i+1)/(2*len(o.Needles)) {
			text = append(text, next())
		}
		text = append(text, n.Fact...)
	}
	for len(text) < o.Length {
		text = append(text, next())
	}
	for range more {
		tail = append(tail, next())
	}
	return text, tail
}

// longReader is a text in a cache of its own.
type longReader struct {
	m   *Model
	kv  *cache.Pool
	seq *cache.Sequence
	o   *LongTextOptions
}

// pass computes tokens at a position, and returns the logits of the last ones. What stood there is written over.
func (r *longReader) pass(ctx context.Context, at int, tokens []int32, last int, s tensor.Sparse) ([]float32, error) {
	res, err := r.m.Forward(ctx, r.kv, &Batch{Tokens: tokens, Parts: []Part{{Pages: r.seq.Pages(), Start: at, Tokens: len(tokens), Last: last, Sparse: s}}})
	return res.Logits, err
}

// judge measures one way of attention at the end of a text of n tokens.
func (r *longReader) judge(ctx context.Context, n int, tail []int32, s tensor.Sparse) (l LongText, err error) {
	l.Needles = len(r.o.Needles)
	for _, needle := range r.o.Needles {
		found, surprised, err := r.find(ctx, n, needle, s)
		if err != nil {
			return l, err
		}
		if found {
			l.Found++
		}
		l.Surprise += surprised / float64(len(r.o.Needles))
	}
	began := time.Now()
	if _, err := r.pass(ctx, n, tail[:readTokens], 0, s); err != nil {
		return l, err
	}
	l.Read = readTokens / time.Since(began).Seconds()
	began = time.Now()
	sum := 0.0
	for i := range tailTokens - 1 {
		logits, err := r.pass(ctx, n+i, tail[i:i+1], 1, s)
		if err != nil {
			return l, err
		}
		sum += surprise(logits, tail[i+1])
	}
	l.Write = (tailTokens - 1) / time.Since(began).Seconds()
	l.Perplexity = math.Exp(sum / (tailTokens - 1))
	return l, nil
}

// find asks for a needle and tells whether the likeliest tokens are its answer, and how far from it they are in the mean.
func (r *longReader) find(ctx context.Context, n int, needle Needle, s tensor.Sparse) (found bool, surprised float64, err error) {
	tokens := slices.Concat(needle.Question, needle.Answer)
	found = true
	for i := range tokens[:len(tokens)-1] { // one by one, as answers are generated
		asked := i + 1 - len(needle.Question)
		logits, err := r.pass(ctx, n+i, tokens[i:i+1], b2i(asked >= 0), s)
		if err != nil {
			return false, 0, err
		}
		if asked >= 0 {
			found = found && likeliest(logits) == needle.Answer[asked]
			surprised += surprise(logits, needle.Answer[asked]) / float64(len(needle.Answer))
		}
	}
	return found, surprised, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// likeliest returns the token of the highest logit.
func likeliest(logits []float32) int32 {
	best := 0
	for i, v := range logits {
		if v > logits[best] {
			best = i
		}
	}
	return int32(best)
}

// String says what was measured.
func (l LongText) String() string {
	return fmt.Sprintf("perplexity %.2f, %d of %d needles (%.2f nats), reads %.0f and writes %.1f tokens/s", l.Perplexity, l.Found, l.Needles, l.Surprise, l.Read, l.Write)
}
