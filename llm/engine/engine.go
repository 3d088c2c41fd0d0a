// Package engine serves one language model to many at once.
//
// A loop runs forward passes, each over the next tokens of every text under way:
// those that are being generated, and as much of new prompts as leaves the others
// their pace. What a pass consists of is decided by pure functions (plan, queue);
// the loop only carries it out.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/grammar"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Config is how a model is served. Zero values are replaced by defaults.
type Config struct {
	Window     int            // tokens of prompt and answer together; default and at most the model's
	CacheBytes int64          // memory for keys and values; default what one window takes
	CacheType  tensor.Type    // how keys and values are kept; default F16
	Sequences  int            // texts under way at once; default 16
	Queue      int            // requests that may wait; default 256
	Batch      int            // tokens of one pass; default 512
	Chunk      int            // tokens of one prompt in a pass in which others generate; default 128
	Guess      int            // tokens to guess ahead; 0 is none, or with a Draft, up to 8
	Draft      *model.Model   // a small model of the same vocabulary that guesses; nil: guesses are taken from the text itself
	Sparse     tensor.Sparse  // what tokens attend to, unless a request says otherwise
	Weights    map[string]int // of tenants; absent is 1
	Digest     string         // of the model, which the cached prefixes belong to
	KeepDir    string         // where keys and values go that must make room, and stay from one start to the next; "" is nowhere
	KeepBytes  int64          // in KeepDir at most; default 512 MiB
	Log        *slog.Logger   // nil is nowhere
}

// pageLen is the tokens of a page: little enough to share short prefixes, enough
// for long runs of memory.
const pageLen = 32

func (c *Config) defaults(m model.Config) {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&c.Window, m.Context)
	c.Window = min(c.Window, m.Context)
	set(&c.Sequences, 16)
	set(&c.Queue, 256)
	set(&c.Batch, 512)
	set(&c.Chunk, 128)
	if c.CacheType == tensor.F32 {
		c.CacheType = tensor.F16
	}
	if c.KeepBytes <= 0 {
		c.KeepBytes = 512 << 20
	}
}

// pages is how many pages the cache has: as many as its memory holds, and at
// least what one text of the whole window needs.
func (c *Config) pages(l cache.Layout) int {
	window := (c.Window + max(c.Guess, defaultAhead) + l.KV.PageLen) / l.KV.PageLen
	return max(window, int(c.CacheBytes/l.PageBytes()))
}

// Memory is what serving a model will take beside its weights, in bytes: the cache
// and the buffers of one pass.
func Memory(m model.Config, c Config) int64 {
	c.defaults(m)
	l := model.Layout(m, model.Shard{}, c.CacheType, pageLen)
	states := int64(c.Batch) * int64(5*m.Dim+2*(m.Heads+m.KVHeads)*m.HeadDim+2*m.FFN)
	return int64(c.pages(l))*l.PageBytes() + 4*(states+int64(c.Sequences+c.Guess)*int64(m.Vocab))
}

// DraftMemory is what guessing by a small model takes beside its weights, in bytes.
func DraftMemory(m, small model.Config, c Config) int64 {
	c.defaults(m)
	pages := int64(c.pages(model.Layout(m, model.Shard{}, c.CacheType, pageLen)))
	c.Sequences, c.Guess = 1, 0
	return pages*model.Layout(small, model.Shard{}, c.CacheType, pageLen).PageBytes() + Memory(small, c)
}

// Engine serves a model. Its methods may be called from many goroutines.
type Engine struct {
	model  *model.Model
	tokens *tokenizer.Tokenizer
	config Config
	kv     *cache.Pool
	vocab  func() *grammar.Vocabulary
	stats  stats

	drafter *drafter // nil without a Draft; of the loop alone

	wake chan struct{} // something has been put into queue or left, at most one is pending
	done chan struct{} // the loop has ended
	stop context.CancelFunc

	mu     sync.Mutex
	queue  *queue
	closed bool

	// Of the loop alone.
	running []*sequence // in the order of admission
	spare   []float32
}

// New begins to serve m, which the engine does not close.
func New(m *model.Model, tokens *tokenizer.Tokenizer, c Config) (*Engine, error) {
	if err := tokens.Fits(m.Config().Vocab); err != nil {
		return nil, sandbox.E("engine.New", sandbox.Invalid, "", err)
	}
	c.defaults(m.Config())
	layout := m.Layout(c.CacheType, pageLen)
	kv, err := cache.New(layout, c.pages(layout), cache.Root(c.Digest))
	if err != nil {
		return nil, err
	}
	if c.KeepDir != "" {
		// Without a disk, or beside another process that has it, a model is served all the same.
		if err := kv.Keep(c.KeepDir, c.KeepBytes); err != nil && c.Log != nil {
			c.Log.Warn("keys and values are not kept on disk", "error", err)
		}
	}
	var d *drafter
	if c.Draft != nil {
		if d, err = newDrafter(c.Draft, &c, c.pages(layout)); err != nil {
			return nil, errors.Join(err, kv.Close())
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	e := &Engine{drafter: d,
		model: m, tokens: tokens, config: c, kv: kv, queue: newQueue(c.Queue, c.Weights),
		wake: make(chan struct{}, 1), done: make(chan struct{}), stop: stop,
	}
	e.vocab = sync.OnceValue(func() *grammar.Vocabulary {
		texts := make([][]byte, tokens.Len())
		for i := range texts {
			texts[i] = []byte(tokens.Bytes(int32(i))) // a vocabulary is far below 2^31
		}
		return grammar.NewVocabulary(texts)
	})
	go e.loop(ctx)
	return e, nil
}

// Window is how many tokens a prompt and its answer may have together.
func (e *Engine) Window() int { return e.config.Window }

// CacheType is how keys and values are kept.
func (e *Engine) CacheType() tensor.Type { return e.config.CacheType }

// Numbers names what answers depend on beside the model and the request.
func (e *Engine) Numbers() string {
	return fmt.Sprint(e.config.Digest, e.config.CacheType, e.config.Sparse)
}

// Sparse is what tokens attend to.
func (e *Engine) Sparse() tensor.Sparse { return e.config.Sparse }

// Close ends the loop; requests under way fail with Unavailable. Prefixes are kept
// in Config.KeepDir.
func (e *Engine) Close() error {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	e.mu.Unlock()
	if closed {
		return nil
	}
	e.stop()
	<-e.done
	if e.drafter != nil {
		_ = e.drafter.kv.Close() // only gives memory back
	}
	return e.kv.Close()
}

// Request asks for a continuation of a text.
type Request struct {
	Tenant   string
	Prompt   []int32
	Limit    int // tokens to generate at most; 0 is what the window leaves
	Sampling Sampling
	Stop     []string         // texts that end the answer and are not part of it
	Likely   int              // for each token, how many of the likeliest are told; -1 is none, and no probability either
	Form     *grammar.Grammar // what the answer must be like; nil is anything. It must not be used elsewhere
	Endless  bool             // go on where the model wants to end: for measuring
	Sparse   *tensor.Sparse   // what tokens attend to; nil is as Config says
	Embed    bool             // no answer but the state of the text, see Engine.Embed
}

// Finish is why an answer ended.
type Finish string

// The reasons.
const (
	FinishStop   Finish = "stop"   // the model, a stop string or the form ended it
	FinishLength Finish = "length" // the limit or the window did
)

// Token is one token of an answer.
type Token struct {
	ID      int32
	LogProb float32
	Likely  []Alternative // likeliest first
}

// Piece is a part of an answer. The last has a Finish. Text ends at whole
// characters, and Tokens are those that were generated for it; with stop strings
// they may come before their text does.
type Piece struct {
	Text   string
	Tokens []Token
	Finish Finish
}

// Usage counts the tokens of one request.
type Usage struct {
	Prompt, Cached, Answer int           // Cached of Prompt were found in the cache
	Guessed, Right         int           // tokens guessed ahead, and how many were so
	First, Total           time.Duration // until the first token, and the end
}

// Stream is an answer under way.
type Stream struct{ s *sequence }

// Submit asks for an answer. It fails with Invalid when the prompt does not fit the
// window, with Exhausted when too many wait. The request ends with ctx.
func (e *Engine) Submit(ctx context.Context, r Request) (*Stream, error) {
	const op = "engine.Submit"
	if n := len(r.Prompt); n == 0 || n >= e.config.Window {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "a prompt of %d tokens for a window of %d", n, e.config.Window).
			WithHint("shorten it, or choose a wider window with --window, up to what the model was made for")
	}
	for _, t := range r.Prompt {
		if t < 0 || int(t) >= e.model.Config().Vocab {
			return nil, sandbox.Errorf(op, sandbox.Invalid, "", "token %d of a vocabulary of %d", t, e.model.Config().Vocab)
		}
	}
	left := e.config.Window - len(r.Prompt)
	if r.Limit <= 0 || r.Limit > left {
		r.Limit = left
	}
	s := newSequence(ctx, r)
	s.sparse = e.config.Sparse
	if r.Sparse != nil {
		s.sparse = *r.Sparse
	}
	if r.Form != nil {
		s.form = grammar.NewMatcher(r.Form, e.vocab())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, "", "the model is being closed")
	}
	if !e.queue.push(s) {
		e.stats.refused.Add(1)
		return nil, sandbox.Errorf(op, sandbox.Exhausted, "", "%d requests wait already", e.queue.size).WithHint("try again later")
	}
	e.stats.waiting.Store(int64(e.queue.size))
	e.nudge()
	s.unwatch = context.AfterFunc(s.ctx, func() { e.drop(s) })
	return &Stream{s}, nil
}

func (e *Engine) nudge() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// drop is called when nobody wants s any more.
func (e *Engine) drop(s *sequence) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.queue.remove(s) {
		e.stats.waiting.Store(int64(e.queue.size))
		s.fail(context.Canceled)
		return
	}
	e.nudge() // the loop sees that its context has ended
}

// Next waits for the next piece. After the one with a Finish there is none.
func (s *Stream) Next(ctx context.Context) (Piece, error) { return s.s.next(ctx) }

// Usage is what the request has taken so far.
func (s *Stream) Usage() Usage { return s.s.used() }

// Close gives up on the answer; the request takes nothing any more.
func (s *Stream) Close() { s.s.cancel() }

// Embed returns the mean of the model's last states over a text, made of length 1.
func (e *Engine) Embed(ctx context.Context, tenant string, prompt []int32) ([]float32, error) {
	if len(prompt) > e.config.Window-1 {
		return nil, sandbox.Errorf("engine.Embed", sandbox.Invalid, "", "a text of %d tokens for a window of %d", len(prompt), e.config.Window)
	}
	s, err := e.Submit(ctx, Request{Tenant: tenant, Prompt: prompt, Limit: 1, Embed: true, Likely: -1})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if _, err := s.Next(ctx); err != nil {
		return nil, err
	}
	mean, sum := s.s.states, 0.0
	for _, v := range mean {
		sum += float64(v) * float64(v)
	}
	tensor.Scale(mean, float32(1/math.Max(math.Sqrt(sum), 1e-12)))
	return mean, nil
}
