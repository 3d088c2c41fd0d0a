package grammar

import "slices"

// Vocabulary is the texts of a model's tokens, ordered so that those which begin
// alike are looked at together. It may be shared by goroutines.
type Vocabulary struct {
	size  int
	order []entry // ascending by text
}

type entry struct {
	text  []byte
	token int32
}

// NewVocabulary makes one of the text of each token. A token without text, as a
// control token has none, is never allowed by a form.
func NewVocabulary(texts [][]byte) *Vocabulary {
	v := &Vocabulary{size: len(texts)}
	for i, t := range texts {
		if len(t) > 0 {
			v.order = append(v.order, entry{t, int32(i)}) // a vocabulary is far below 2^31
		}
	}
	slices.SortFunc(v.order, func(a, b entry) int { return slices.Compare(a.text, b.text) })
	return v
}

// Mask is the set of tokens that may come next.
type Mask []uint64

// Has reports whether a token is in the set.
func (m Mask) Has(token int32) bool {
	return int(token>>6) < len(m) && m[token>>6]&(1<<(token&63)) != 0
}

// maxMasks bounds the masks that a Matcher keeps: strings and numbers come back
// to the same few states.
const maxMasks = 64

// Matcher follows one text through a form, token by token. It is used by one
// goroutine at a time.
type Matcher struct {
	g     *Grammar
	vocab *Vocabulary
	state State
	masks map[State]Mask
}

// NewMatcher begins a text of the form.
func NewMatcher(g *Grammar, vocab *Vocabulary) *Matcher {
	return &Matcher{g: g, vocab: vocab, state: g.Start(), masks: map[State]Mask{}}
}

// Done reports whether the text may end here.
func (m *Matcher) Done() bool { return m.g.Done(m.state) }

// Over reports whether nothing can follow any more.
func (m *Matcher) Over() bool {
	return m.state == Dead || (len(m.g.sets[m.state]) == 1 && m.g.sets[m.state][0] == 0)
}

// Accept adds a text and reports whether the form allows it; when not, the
// matcher stays where it was.
func (m *Matcher) Accept(text []byte) bool {
	to := m.g.Walk(m.state, text)
	if to == Dead {
		return false
	}
	m.state = to
	return true
}

// Fork is a matcher at the same place that moves by itself, for looking ahead.
// The two must not be used at the same time.
func (m *Matcher) Fork() *Matcher {
	c := *m
	return &c
}

// Allowed is the set of tokens that the form allows next. The mask is valid until
// the matcher's next call.
func (m *Matcher) Allowed() Mask {
	if mask, ok := m.masks[m.state]; ok {
		return mask
	}
	if len(m.masks) >= maxMasks {
		clear(m.masks)
	}
	mask := make(Mask, (m.vocab.size+63)/64)
	// path[i] is the state after the first i bytes of the text before; what the
	// next text has in common with it is not walked again.
	path := []State{m.state}
	var before []byte
	for _, e := range m.vocab.order {
		same := 0
		for same < len(before) && same < len(e.text) && before[same] == e.text[same] {
			same++
		}
		path = path[:min(same+1, len(path))]
		for i := len(path) - 1; i < len(e.text) && path[i] != Dead; i++ {
			path = append(path, m.g.Next(path[i], e.text[i]))
		}
		before = e.text
		if len(path) == len(e.text)+1 && path[len(e.text)] != Dead {
			mask[e.token>>6] |= 1 << (e.token & 63)
		}
	}
	m.masks[m.state] = mask
	return mask
}
