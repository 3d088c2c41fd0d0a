package engine

import "github.com/atoll-run/atoll/llm/model"

// work is what planning needs to know of one running sequence.
type work struct {
	pending int // tokens that have no keys and values yet; 1 when it generates
	drafts  int // guesses at what follows, to be computed along with it
	room    int // tokens for which its pages have room
	gives   int // pages that become free when it is put back
}

// limits is what a step may use.
type limits struct {
	tokens     int // in one forward pass
	chunk      int // of one prompt while others generate, so that they are not held up
	pageTokens int
	freePages  int
}

// step says what one forward pass computes.
type step struct {
	compute []int // tokens of each running sequence; pending ones first, then drafts
	putBack []int // sequences that give up their pages and wait again, ascending
}

// plan divides one forward pass. Sequences stand in the order in which they were
// admitted, which is the order of their right to pages: what generates comes
// first, then prompts; when pages run out the youngest are put back. The eldest
// always advances, since the pool holds at least one whole window.
func plan(running []work, l limits) step {
	s := step{compute: make([]int, len(running))}
	gone := make([]bool, len(running))
	generating := 0
	for _, w := range running {
		if w.pending == 1 {
			generating++
		}
	}
	// fit is how many of n tokens of sequence i there are pages for, after putting
	// back younger ones when it gets none at all.
	fit := func(i, n int) int {
		w := running[i]
		for young := len(running) - 1; ; young-- {
			if got := min(n, w.room+l.freePages*l.pageTokens); got > 0 {
				if got > w.room {
					l.freePages -= (got - w.room + l.pageTokens - 1) / l.pageTokens
				}
				return got
			}
			for young > i && (gone[young] || s.compute[young] > 0) {
				young--
			}
			if young <= i {
				return 0
			}
			gone[young] = true
			l.freePages += running[young].gives
		}
	}
	for i, w := range running {
		if w.pending != 1 || gone[i] || l.tokens == 0 {
			continue
		}
		n := fit(i, 1)
		s.compute[i] = n
		l.tokens -= n
		if n == 0 { // even all the younger had no page: it steps aside itself
			gone[i] = true
			l.freePages += w.gives
		}
	}
	for i, w := range running {
		if w.pending <= 1 || gone[i] || l.tokens == 0 {
			continue
		}
		n := min(w.pending, l.tokens)
		if generating > 0 {
			n = min(n, l.chunk)
		}
		if n < w.pending && n > model.Block { // so that results do not depend on where a prompt is cut
			n -= n % model.Block
		}
		s.compute[i] = fit(i, n)
		l.tokens -= s.compute[i]
	}
	for i, w := range running { // guesses only use what is left over
		if s.compute[i] == 0 || w.pending != 1 {
			continue
		}
		n := min(w.drafts, l.tokens, max(0, w.room-1)+l.freePages*l.pageTokens)
		if n > w.room-1 {
			l.freePages -= (n - max(0, w.room-1) + l.pageTokens - 1) / l.pageTokens
		}
		s.compute[i] += n
		l.tokens -= n
	}
	for i := range gone {
		if gone[i] {
			s.putBack = append(s.putBack, i)
		}
	}
	return s
}
