package engine

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
)

// firstBounds are the upper bounds of the buckets in which times to the first
// token are counted, in seconds.
var firstBounds = []float64{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60}

// Stats is what an engine has done since it was started.
type Stats struct {
	Running, Waiting                     int64
	Requests, Refused, Canceled, PutBack int64
	PromptTokens, AnswerTokens           int64
	Guessed, Right                       int64
	Passes, PassTokens                   int64
	Busy                                 time.Duration      // spent in passes
	FirstCount                           uint64             // answers whose first token came
	FirstSum                             float64            // seconds
	First                                map[float64]uint64 // cumulative, by upper bound in seconds
	Cache                                cache.Stats
}

type stats struct {
	running, waiting, refused, canceled, putBack atomic.Int64

	mu sync.Mutex
	s  Stats
}

func (t *stats) passed(took time.Duration, tokens int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.Passes++
	t.s.PassTokens += int64(tokens)
	t.s.Busy += took
}

// generated counts one piece, after which u was used.
func (t *stats) generated(u Usage, p Piece) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.AnswerTokens += int64(len(p.Tokens))
	if u.Answer == len(p.Tokens) {
		t.s.Requests++
		t.s.PromptTokens += int64(u.Prompt)
		t.s.FirstCount++
		t.s.FirstSum += u.First.Seconds()
		if t.s.First == nil {
			t.s.First = map[float64]uint64{}
		}
		for _, bound := range firstBounds {
			if u.First.Seconds() <= bound {
				t.s.First[bound]++
			}
		}
	}
	if p.Finish != "" {
		t.s.Guessed += int64(u.Guessed)
		t.s.Right += int64(u.Right)
	}
}

// note keeps a copy of the cache's counts, which only the loop may read.
func (t *stats) note(c cache.Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.Cache = c
}

// Stats returns the counts so far.
func (e *Engine) Stats() Stats {
	t := &e.stats
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.s
	s.First = map[float64]uint64{}
	for _, bound := range firstBounds {
		s.First[bound] = t.s.First[bound]
	}
	s.Running, s.Waiting, s.Refused, s.Canceled, s.PutBack = t.running.Load(), t.waiting.Load(), t.refused.Load(), t.canceled.Load(), t.putBack.Load()
	return s
}
