package engine

import (
	"context"
	"slices"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/sandbox"
)

// A drafter guesses what follows by a small model of the same vocabulary. What it guesses is computed by the large model in one
// pass, and taken or not such that answers are distributed as if nobody had guessed; see sampler.verify.
type drafter struct {
	model *model.Model
	kv    *cache.Pool
	most  int // tokens to guess ahead
	chunk int // tokens that are read of a text in one pass

	cost         float64 // what guessing a token takes, in passes of the large model
	mine, theirs float64 // seconds of either, of late
}

// draft is a token that was guessed, and what from.
type draft struct {
	token int32
	from  []candidate // with what probabilities it was chosen; nil when it just was guessed
}

// defaultAhead is how many tokens a drafter guesses at most.
const defaultAhead = 8

func newDrafter(m *model.Model, c *Config, pages int) (*drafter, error) {
	kv, err := cache.New(m.Layout(c.CacheType, pageLen), pages, cache.Root(""))
	if err != nil {
		return nil, err
	}
	d := &drafter{model: m, kv: kv, most: defaultAhead, chunk: c.Batch, cost: 0.3}
	if c.Guess > 0 {
		d.most = c.Guess
	}
	return d, nil
}

// ahead returns how many tokens it pays to guess when each is right with probability right, guessing one takes cost of what a pass
// takes, and each makes the pass longer by a little: the number with the most tokens for the time. With n guesses a pass gives
// 1 + right + ... + right^n tokens.
func ahead(right, cost float64, most int) int {
	const longer = 0.08 // of a pass, for each token more: weights are read once, but computed with more often
	best, rate := 0, 1.0
	gives, power := 1.0, 1.0
	for n := 1; n <= most; n++ {
		power *= right
		gives += power
		if r := gives / (1 + float64(n)*(cost+longer)); r > rate {
			best, rate = n, r
		}
	}
	return best
}

// probeEvery is after how many tokens without guesses one is made, to see whether guessing has become worth it.
const probeEvery = 32

// wanted is how many tokens to guess for s.
func (d *drafter) wanted(s *sequence) int {
	if s.pending() != 1 || s.form != nil || s.req.Embed {
		return 0
	}
	n := ahead(s.right, d.cost, d.most)
	if n == 0 {
		if s.unguessed++; s.unguessed >= probeEvery {
			n = 1
		}
	}
	return min(n, s.req.Limit-(len(s.text)-len(s.req.Prompt))-1)
}

// propose guesses for all sequences that generate. A text that the small model has not read yet is read in pieces, along with
// the passes of the large one.
func (d *drafter) propose(ctx context.Context, all []*sequence, vocab int) error {
	var list []*sequence
	left := d.chunk
	for _, s := range all {
		n := d.wanted(s)
		if n <= 0 {
			continue
		}
		if s.small == nil {
			s.small = d.kv.NewSequence("")
		}
		s.small.Adopt(s.text)
		todo := len(s.text) - s.small.Len()
		if todo > left || !s.small.Grow(todo) { // a piece of it, if any
			todo = min(todo, left) / pageLen * pageLen
			if todo == 0 || !s.small.Grow(todo) {
				continue
			}
			left -= todo
			if _, err := d.read(ctx, []*sequence{s}, todo); err != nil {
				return err
			}
			continue
		}
		left -= todo
		s.guess, s.unguessed = n, 0
		list = append(list, s)
	}
	return d.guess(ctx, list, vocab)
}

// guess lets the small model write on where it has read all.
func (d *drafter) guess(ctx context.Context, list []*sequence, vocab int) error {
	for step := 0; len(list) > 0; step++ {
		began := time.Now()
		logits, err := d.read(ctx, list, 0)
		if err != nil {
			return err
		}
		if step > 0 {
			d.took(time.Since(began))
		}
		next := list[:0]
		for i, s := range list {
			row := logits[i*d.model.Config().Vocab:][:vocab]
			text := slices.Clone(s.text[max(0, len(s.text)-repetitionWindow):])
			for _, g := range s.drafts {
				text = append(text, g.token)
			}
			from := s.sample.distribution(row, nil, text)
			if len(from) == 0 {
				continue
			}
			token := s.sample.draw(from)
			s.drafts = append(s.drafts, draft{token, slices.Clone(from)})
			if len(s.drafts) < s.guess && s.small.Grow(len(s.drafts)) {
				next = append(next, s)
			}
		}
		list = next
	}
	return nil
}

// read takes a pass of the small model: over what it has not read of each text, and what has been guessed since, or over the first n
// tokens that it has not read, when n is not 0. It returns the logits of the last tokens.
func (d *drafter) read(ctx context.Context, list []*sequence, n int) ([]float32, error) {
	var b model.Batch
	for _, s := range list {
		at := s.small.Len()
		part := model.Part{Pages: s.small.Pages(), Start: at, Last: 1}
		switch {
		case n > 0:
			b.Tokens = append(b.Tokens, s.text[at:at+n]...)
			part.Tokens, part.Last = n, 0
		case len(s.drafts) > 0: // its text has been read
			part.Start += len(s.drafts) - 1
			b.Tokens = append(b.Tokens, s.drafts[len(s.drafts)-1].token)
			part.Tokens = 1
		default:
			b.Tokens = append(b.Tokens, s.text[at:]...)
			part.Tokens = len(s.text) - at
		}
		b.Parts = append(b.Parts, part)
	}
	r, err := d.model.Forward(ctx, d.kv, &b)
	if err != nil {
		return nil, sandbox.E("engine.draft", "", "", err)
	}
	for i, s := range list {
		if len(s.drafts) == 0 {
			at := s.small.Len()
			s.small.Commit(s.text[at : at+b.Parts[i].Tokens]...)
		}
	}
	return r.Logits, nil
}

// took notes how long guessing one token took; passed how long a pass of the large model did, that read no prompt.
func (d *drafter) took(t time.Duration) { d.mine = mean(d.mine, t.Seconds()) }

func (d *drafter) passed(t time.Duration) {
	d.theirs = mean(d.theirs, t.Seconds())
	if d.mine > 0 {
		d.cost = d.mine / d.theirs
	}
}

// mean is a mean in which the past fades.
func mean(before, now float64) float64 {
	if before == 0 {
		return now
	}
	return before + (now-before)/8
}

// judged notes how many of a sequence's guesses were right, and keeps what the small model has read of them.
func (d *drafter) judged(s *sequence, right int) {
	for i := range min(right+1, len(s.drafts)) {
		was := 0.0
		if i < right {
			was = 1
		}
		s.right += (was - s.right) / 16
	}
	if n := min(right, len(s.drafts)-1); n > 0 && s.small != nil { // the last guess was not read
		for _, g := range s.drafts[:n] {
			s.small.Commit(g.token)
		}
	}
}
