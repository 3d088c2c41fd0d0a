package engine

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/grammar"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// sequence is one request on its way through the engine. Up to mu its fields are
// the loop's, once the request has been taken from the queue.
type sequence struct {
	req     Request
	ctx     context.Context
	cancel  context.CancelFunc
	unwatch func() bool // stops telling the engine of ctx's end

	text   []int32 // prompt and answer
	kv     *cache.Sequence
	sparse tensor.Sparse
	sample *sampler
	form   *grammar.Matcher
	ending *ending
	drafts []draft   // guessed to follow text, in this pass
	states []float32 // sum of the states of a text to embed
	begun  time.Time

	// Of the drafter.
	small     *cache.Sequence // what the small model has read of text; nil is nothing
	guess     int             // tokens to guess in this pass
	unguessed int             // passes since the last guess
	right     float64         // how likely a guess is right, by those of late

	mu     sync.Mutex
	pieces []Piece // not taken yet; one at most for each token, of which there are req.Limit at most
	ready  chan struct{}
	err    error
	over   bool
	usage  Usage
}

func newSequence(ctx context.Context, r Request) *sequence {
	s := &sequence{req: r, text: slices.Clone(r.Prompt), sample: newSampler(r.Sampling), ending: newEnding(r.Stop), ready: make(chan struct{}, 1), begun: time.Now(), right: 0.75}
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.usage.Prompt = len(r.Prompt)
	return s
}

// cost is the tokens by which a request is weighed against those of others.
func (s *sequence) cost() int { return len(s.text) + s.req.Limit }

// pending is how many tokens of the text have no keys and values yet.
func (s *sequence) pending() int { return len(s.text) - s.kv.Len() }

// release lets all pages go.
func (s *sequence) release() {
	s.kv.Release()
	if s.small != nil {
		s.small.Release()
		s.small = nil
	}
}

// put hands a piece to the caller.
func (s *sequence) put(p Piece) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Since(s.begun)
	if s.usage.Answer == 0 {
		s.usage.First = now
	}
	s.usage.Answer += len(p.Tokens)
	s.usage.Total = now
	s.pieces = append(s.pieces, p)
	s.over = p.Finish != ""
	s.signal()
}

func (s *sequence) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over && s.err == nil {
		s.err = sandbox.E("engine", "", "", err)
	}
	s.signal()
}

// signal wakes the caller; mu is held.
func (s *sequence) signal() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *sequence) next(ctx context.Context) (Piece, error) {
	for {
		s.mu.Lock()
		switch {
		case len(s.pieces) > 0:
			p := merge(s.pieces)
			s.pieces = s.pieces[:0]
			s.mu.Unlock()
			return p, nil
		case s.err != nil || s.over:
			err := s.err
			s.mu.Unlock()
			if err == nil {
				err = sandbox.Errorf("engine.Next", sandbox.Conflict, "", "the answer has ended")
			}
			return Piece{}, err
		}
		s.mu.Unlock()
		select {
		case <-s.ready:
		case <-ctx.Done():
			return Piece{}, sandbox.E("engine.Next", "", "", ctx.Err())
		}
	}
}

// merge makes one piece of those that a slow caller let pile up.
func merge(pieces []Piece) Piece {
	p := pieces[0]
	for _, more := range pieces[1:] {
		p.Text += more.Text
		p.Tokens = append(p.Tokens, more.Tokens...)
		p.Finish = more.Finish
	}
	return p
}

func (s *sequence) used() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage
}

// count changes the usage.
func (s *sequence) count(f func(*Usage)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.usage)
}
