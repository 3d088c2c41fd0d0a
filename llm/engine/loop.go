package engine

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/atoll-run/atoll/llm/grammar"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// loop runs passes while there is something to do.
func (e *Engine) loop(ctx context.Context) {
	defer close(e.done)
	for ctx.Err() == nil {
		e.sweep()
		e.admit()
		if len(e.running) == 0 {
			select {
			case <-e.wake:
			case <-ctx.Done():
			}
			continue
		}
		if err := e.pass(ctx); err != nil {
			// The weights never will arrive, or we are at fault: no text under
			// way can go on, and those that come will be told the same.
			e.failAll(err)
		}
	}
	e.mu.Lock()
	for s := e.queue.next(); s != nil; s = e.queue.next() {
		e.queue.pop()
		s.fail(sandbox.Errorf("engine", sandbox.Unavailable, "", "the model was closed"))
	}
	e.mu.Unlock()
	e.failAll(sandbox.Errorf("engine", sandbox.Unavailable, "", "the model was closed"))
}

func (e *Engine) failAll(err error) {
	for _, s := range slices.Clone(e.running) {
		s.fail(err)
		e.leave(s)
	}
}

// sweep ends what is not wanted any more.
func (e *Engine) sweep() {
	for _, s := range slices.Clone(e.running) {
		if s.ctx.Err() != nil {
			s.fail(context.Canceled)
			e.stats.canceled.Add(1)
			e.leave(s)
		}
	}
}

// leave takes a sequence out of those that run and lets its pages go.
func (e *Engine) leave(s *sequence) {
	if i := slices.Index(e.running, s); i >= 0 {
		e.running = slices.Delete(e.running, i, i+1)
	}
	s.release()
	s.unwatch()
	s.cancel()
	e.stats.running.Store(int64(len(e.running)))
}

// admit starts requests, in turn, as long as there is room for a first part of
// their prompts.
func (e *Engine) admit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.running) < e.config.Sequences {
		s := e.queue.next()
		if s == nil {
			break
		}
		if s.kv == nil {
			s.kv = e.kv.NewSequence(kindOf(s.sparse))
		}
		if s.kv.Len() == 0 && !s.req.Embed {
			cached := s.kv.Adopt(s.text)
			if len(s.text) == len(s.req.Prompt) { // not one that was put back
				s.count(func(u *Usage) { u.Cached = cached })
			}
		}
		if s.kv.Need(min(s.pending(), e.config.Chunk)) > e.kv.Free() && len(e.running) > 0 {
			s.release()
			break
		}
		e.queue.pop()
		e.running = append(e.running, s)
	}
	e.stats.running.Store(int64(len(e.running)))
	e.stats.waiting.Store(int64(e.queue.size))
}

// pass plans and runs one forward pass and deals with what it says.
func (e *Engine) pass(ctx context.Context) error {
	if err := e.guess(ctx); err != nil {
		return err
	}
	todo := make([]work, len(e.running))
	for i, s := range e.running {
		if e.follows(i) {
			todo[i] = work{gives: s.kv.Own()}
			continue
		}
		todo[i] = work{pending: s.pending(), drafts: len(s.drafts), room: len(s.kv.Pages())*pageLen - s.kv.Len(), gives: s.kv.Own()}
	}
	st := plan(todo, limits{tokens: e.config.Batch, chunk: e.config.Chunk, pageTokens: pageLen, freePages: e.kv.Free()})
	var back []*sequence
	for _, i := range st.putBack { // their pages stay known, so little is computed twice
		s := e.running[i]
		s.release()
		s.states = nil
		back = append(back, s)
	}
	batches := [2]struct {
		b    model.Batch
		seqs []*sequence
	}{1: {b: model.Batch{StatesOnly: true}}} // answers, and texts to embed
	for i, s := range e.running {
		n := st.compute[i]
		if n == 0 {
			continue
		}
		known := min(n, s.pending())
		s.drafts = s.drafts[:n-known]
		s.count(func(u *Usage) { u.Guessed += len(s.drafts) })
		if !s.kv.Grow(n) {
			return sandbox.Errorf("engine.pass", sandbox.Internal, "", "the plan gave out pages that are not there")
		}
		kind, last := 0, 0
		if s.req.Embed {
			kind, last = 1, n
		} else if known == s.pending() {
			last = 1 + len(s.drafts)
		}
		at := &batches[kind]
		at.b.Tokens = append(at.b.Tokens, s.text[s.kv.Len():s.kv.Len()+known]...)
		for _, d := range s.drafts {
			at.b.Tokens = append(at.b.Tokens, d.token)
		}
		at.b.Parts = append(at.b.Parts, model.Part{Pages: s.kv.Pages(), Start: s.kv.Len(), Tokens: n, Last: last, Sparse: s.sparse})
		at.seqs = append(at.seqs, s)
	}
	began, generating := time.Now(), !slices.ContainsFunc(todo, func(w work) bool { return w.pending > 1 })
	for i := range batches {
		at := &batches[i]
		if len(at.seqs) == 0 {
			continue
		}
		r, err := e.model.Forward(ctx, e.kv, &at.b)
		if err != nil {
			return err
		}
		row := 0
		for j, s := range at.seqs {
			last := at.b.Parts[j].Last
			if i == 1 {
				e.embedded(s, at.b.Parts[j].Tokens, r.States[row*e.model.Config().Dim:])
			} else {
				e.computed(s, at.b.Parts[j].Tokens, r.Logits[row*e.model.Config().Vocab:(row+last)*e.model.Config().Vocab])
			}
			row += last
		}
	}
	if e.drafter != nil && generating {
		e.drafter.passed(time.Since(began))
	}
	e.stats.passed(time.Since(began), len(batches[0].b.Tokens)+len(batches[1].b.Tokens))
	e.stats.note(e.kv.Stats())
	e.requeue(back)
	return nil
}

// guess lets sequences take over what others have computed of their texts meanwhile, and guesses what follows.
func (e *Engine) guess(ctx context.Context) error {
	for _, s := range e.running {
		s.drafts = nil
		if s.pending() > 1 && !s.req.Embed {
			if found := s.kv.Adopt(s.text); len(s.text) == len(s.req.Prompt) {
				s.count(func(u *Usage) { u.Cached += found })
			}
		}
		if e.drafter == nil && e.config.Guess > 0 && s.pending() == 1 && s.form == nil && !s.req.Embed {
			s.drafts = guess(s.text, min(e.config.Guess, s.req.Limit-(len(s.text)-len(s.req.Prompt))-1))
		}
	}
	if e.drafter == nil {
		return nil
	}
	return e.drafter.propose(ctx, e.running, e.tokens.Len())
}

// follows tells whether the next page of a sequence is one that an elder is about to compute: it is taken over then. So of
// several texts that begin alike, such as the choices for one prompt, only one is computed.
func (e *Engine) follows(i int) bool {
	s := e.running[i]
	next := s.kv.Len() + pageLen
	if s.req.Embed || s.kv.Len()%pageLen != 0 || len(s.kv.Pages())*pageLen != s.kv.Len() || len(s.text) <= next {
		return false
	}
	return slices.ContainsFunc(e.running[:i], func(r *sequence) bool {
		return r.sparse == s.sparse && r.kv.Len() < next && len(r.text) >= next && r.pending() > 1 && slices.Equal(r.text[:next], s.text[:next])
	})
}

// requeue puts sequences back in front of those that wait.
func (e *Engine) requeue(back []*sequence) {
	if len(back) == 0 {
		return
	}
	e.running = slices.DeleteFunc(e.running, func(s *sequence) bool { return slices.Contains(back, s) })
	e.stats.putBack.Add(int64(len(back)))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.queue.resume(back)
}

// computed commits what a pass computed for s and, when it has come to the end of
// the text, adds tokens to it: one for each row of logits, as long as the guesses
// were right.
func (e *Engine) computed(s *sequence, n int, logits []float32) {
	vocab := e.model.Config().Vocab
	known := n - len(s.drafts)
	s.kv.Commit(s.text[s.kv.Len() : s.kv.Len()+known]...)
	rows, right := len(logits)/vocab, 0
	defer func() {
		if e.drafter != nil && rows > 0 {
			e.drafter.judged(s, right)
		}
	}()
	for i := range rows {
		var d draft
		if i < rows-1 {
			d = s.drafts[i]
		}
		token, piece := e.choose(s, logits[i*vocab:i*vocab+e.tokens.Len()], d) // rows beyond the tokens are padding
		s.put(piece)
		e.stats.generated(s.used(), piece)
		if piece.Finish != "" {
			e.leave(s)
			return
		}
		s.text = append(s.text, token)
		if i < rows-1 {
			if token != d.token {
				return
			}
			right++
			s.kv.Commit(token) // the guess's keys and values are those of the token
			s.count(func(u *Usage) { u.Right++ })
		}
	}
}

// choose samples one token and says what the caller gets to see of it.
// d is what was guessed, if anything.
func (e *Engine) choose(s *sequence, logits []float32, d draft) (int32, Piece) {
	var mask grammar.Mask
	if s.form != nil {
		mask = e.allowed(s)
	}
	var told []float32
	if s.req.Likely >= 0 {
		e.spare = append(e.spare[:0], logits...)
		told = e.spare
	}
	if s.req.Endless {
		for _, token := range e.tokens.Stops() {
			logits[token] = float32(math.Inf(-1))
		}
	}
	var token int32
	if d.from != nil { // a text with a form is not guessed by a drafter
		token = s.sample.verify(logits, s.text, d)
	} else {
		token = s.sample.choose(logits, mask, s.text)
	}
	if token < 0 { // nothing is allowed, or the logits are no numbers
		return 0, Piece{Text: s.ending.rest(), Finish: FinishStop}
	}
	t := Token{ID: token}
	if told != nil {
		t.LogProb, t.Likely = logProbs(told, token, s.req.Likely)
	}
	s.sample.note(token)
	answer := len(s.text) - len(s.req.Prompt) + 1
	if e.tokens.Stop(token) && !s.req.Endless {
		return token, Piece{Text: s.ending.rest(), Tokens: []Token{t}, Finish: FinishStop}
	}
	piece := []byte(e.tokens.Bytes(token))
	text, stopped := s.ending.add(piece)
	p := Piece{Text: text, Tokens: []Token{t}}
	if s.form != nil {
		s.form.Accept(piece) // the mask said that it may
		stopped = stopped || s.form.Over()
	}
	switch {
	case stopped:
		p.Finish = FinishStop
		if s.form != nil && s.form.Over() {
			p.Text += s.ending.rest()
		}
	case answer >= s.req.Limit:
		p.Finish = FinishLength
		p.Text += s.ending.rest()
	}
	return token, p
}

// allowed is what the form lets follow, with the tokens that end an answer where
// the text may end.
func (e *Engine) allowed(s *sequence) grammar.Mask {
	mask := s.form.Allowed()
	if !s.form.Done() {
		return mask
	}
	mask = slices.Clone(mask)
	for _, token := range e.tokens.Stops() {
		mask[token>>6] |= 1 << (token & 63)
	}
	return mask
}

// embedded adds states to the mean of a text, and ends it when all are there.
func (e *Engine) embedded(s *sequence, n int, states []float32) {
	dim := e.model.Config().Dim
	s.kv.Commit(s.text[s.kv.Len() : s.kv.Len()+n]...)
	if s.states == nil {
		s.states = make([]float32, dim)
	}
	for t := range n {
		tensor.Add(s.states, states[t*dim:(t+1)*dim])
	}
	if s.pending() == 0 {
		tensor.Scale(s.states, 1/float32(len(s.text)))
		s.put(Piece{Finish: FinishStop})
		e.leave(s)
	}
}
