package tokenizer

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// A merger turns a word into tokens: it starts from the smallest pieces and
// joins the pair of neighbours of the lowest rank, the leftmost of equals, until no
// pair is left.
type merger struct {
	// pairs holds the joins of byte-level BPE: two ids to what they become. It is
	// nil for SentencePiece, where two pieces join if their text is a token.
	pairs map[[2]int32]join
	ids   map[string]int32
	ranks []int32 // of tokens, for SentencePiece

	bytes   [256]int32 // the token of each byte, or -1
	unk     int32
	longest int // bytes of the longest token
	work    *sync.Pool
	known   *known
}

// known remembers the tokens of words, since text repeats itself. It forgets
// everything when it is full.
type known struct {
	mu    sync.RWMutex
	words map[string][]int32
}

// The bounds of what is remembered: words, and bytes of a word.
const (
	maxKnown = 1 << 14
	maxWord  = 48
)

func (k *known) get(word string) ([]int32, bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	ids, ok := k.words[word]
	return ids, ok
}

func (k *known) put(word string, ids []int32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.words) >= maxKnown {
		clear(k.words)
	}
	k.words[strings.Clone(word)] = slices.Clone(ids)
}

type join struct{ rank, id int32 }

// A piece is a run of a word. Pieces form a list, so that joining is cheap.
type piece struct {
	from, to   int32 // in bytes of the word; empty when it was joined to its left
	prev, next int32 // -1: none
	id         int32 // -1: the text is no token
}

// A candidate is a join that was possible when it was found. size tells whether it
// still is: pieces only grow.
type candidate struct {
	rank, left, right int32
	size              int32 // of both in bytes
	id                int32
}

type workspace struct {
	pieces []piece
	heap   []candidate
}

func newMerger(spec *Spec, ids map[string]int32, texts []string) (merger, error) {
	m := merger{ids: ids, unk: -1, known: &known{words: map[string][]int32{}}, work: &sync.Pool{New: func() any { return new(workspace) }}}
	for i := range m.bytes {
		m.bytes[i] = -1
	}
	for key := range ids {
		m.longest = max(m.longest, len(key))
	}
	if spec.Model == ModelSentencePiece {
		for i, typ := range spec.Types {
			if typ != Byte {
				continue
			}
			if b, ok := byteOf(spec.Tokens[i]); ok {
				m.bytes[b] = int32(i)
			}
		}
		m.ranks, m.unk = ranks(spec.Scores), spec.Unk
		return m, nil
	}
	for b := range 256 {
		if id, ok := ids[string([]byte{byte(b)})]; ok {
			m.bytes[b] = id
		}
	}
	m.pairs = make(map[[2]int32]join, len(spec.Merges))
	for rank, pair := range spec.Merges {
		left, right, ok := cutMerge(pair)
		if !ok {
			return m, fmt.Errorf("merge %d is %q, not two tokens", rank, pair)
		}
		l, r := unmap(left), unmap(right)
		a, okA := ids[l]
		b, okB := ids[r]
		c, okC := ids[l+r]
		if !okA || !okB || !okC {
			return m, fmt.Errorf("merge %d, %q, joins what is not in the vocabulary", rank, pair)
		}
		if _, taken := m.pairs[[2]int32{a, b}]; !taken {
			m.pairs[[2]int32{a, b}] = join{rank: int32(rank), id: c}
		}
	}
	return m, nil
}

// cutMerge splits a merge at the space between its tokens, neither of which is
// empty.
func cutMerge(pair string) (left, right string, ok bool) {
	if len(pair) < 3 {
		return "", "", false
	}
	i := strings.IndexByte(pair[1:], ' ') + 1
	if i < 1 || i == len(pair)-1 {
		return "", "", false
	}
	return pair[:i], pair[i+1:], true
}

// ranks orders tokens by score, the highest first; equal scores have equal ranks.
func ranks(scores []float32) []int32 {
	order := make([]int32, len(scores))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortFunc(order, func(a, b int32) int {
		switch sa, sb := scores[a], scores[b]; {
		case sa > sb:
			return -1
		case sa < sb:
			return 1
		}
		return int(a - b)
	})
	out := make([]int32, len(scores))
	rank := int32(0)
	for i, id := range order {
		if i > 0 && scores[id] != scores[order[i-1]] {
			rank++
		}
		out[id] = rank
	}
	return out
}

// merge appends the tokens of a word.
func (m *merger) merge(out []int32, word string) []int32 {
	if len(word) > maxWord {
		return m.join(out, word)
	}
	ids, ok := m.known.get(word)
	if !ok {
		ids = m.join(nil, word)
		m.known.put(word, ids)
	}
	return append(out, ids...)
}

func (m *merger) join(out []int32, word string) []int32 {
	w := m.work.Get().(*workspace)
	defer m.work.Put(w)
	m.start(w, word)
	for i := 0; i+1 < len(w.pieces); i++ {
		m.propose(w, word, int32(i), int32(i+1))
	}
	for len(w.heap) > 0 {
		c := w.pop()
		left, right := &w.pieces[c.left], &w.pieces[c.right]
		if left.to == left.from || right.to == right.from || right.to-left.from != c.size {
			continue // one of the two was joined to something else
		}
		left.to, left.id, left.next = right.to, c.id, right.next
		right.to = right.from
		if right.next >= 0 {
			w.pieces[right.next].prev = c.left
			m.propose(w, word, c.left, right.next)
		}
		if left.prev >= 0 {
			m.propose(w, word, left.prev, c.left)
		}
	}
	return m.collect(out, w, word)
}

// start cuts a word into the smallest pieces: bytes, or characters.
func (m *merger) start(w *workspace, word string) {
	w.pieces, w.heap = w.pieces[:0], w.heap[:0]
	for i := 0; i < len(word); {
		size, id := 1, int32(-1)
		if m.pairs != nil {
			id = m.bytes[word[i]]
		} else {
			_, size = utf8.DecodeRuneInString(word[i:])
			if known, ok := m.ids[word[i:i+size]]; ok {
				id = known
			}
		}
		n := int32(len(w.pieces))
		w.pieces = append(w.pieces, piece{from: int32(i), to: int32(i + size), prev: n - 1, next: n + 1, id: id})
		i += size
	}
	w.pieces[len(w.pieces)-1].next = -1
}

// propose puts the join of two neighbours on the heap, if there is one.
func (m *merger) propose(w *workspace, word string, left, right int32) {
	a, b := &w.pieces[left], &w.pieces[right]
	c := candidate{left: left, right: right, size: b.to - a.from}
	if m.pairs != nil {
		j, ok := m.pairs[[2]int32{a.id, b.id}]
		if !ok {
			return
		}
		c.rank, c.id = j.rank, j.id
	} else {
		if int(c.size) > m.longest {
			return
		}
		id, ok := m.ids[word[a.from:b.to]]
		if !ok {
			return
		}
		c.rank, c.id = m.ranks[id], id
	}
	w.push(c)
}

// collect appends the tokens of what is left. A piece that is no token is spelled
// in bytes, or is the unknown token; what a vocabulary can say in no way is left
// out, as the reference does.
func (m *merger) collect(out []int32, w *workspace, word string) []int32 {
	for i := int32(0); i >= 0; i = w.pieces[i].next {
		p := &w.pieces[i]
		if p.id >= 0 {
			out = append(out, p.id)
			continue
		}
		for _, b := range []byte(word[p.from:p.to]) {
			if id := m.bytes[b]; id >= 0 {
				out = append(out, id)
			} else if m.unk >= 0 {
				out = append(out, m.unk)
				break // one for the whole piece
			}
		}
	}
	return out
}

// before orders candidates: by rank, then from left to right.
func (c candidate) before(d candidate) bool {
	return c.rank < d.rank || c.rank == d.rank && c.left < d.left
}

func (w *workspace) push(c candidate) {
	w.heap = append(w.heap, c)
	i := len(w.heap) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !c.before(w.heap[up]) {
			break
		}
		w.heap[i] = w.heap[up]
		i = up
	}
	w.heap[i] = c
}

func (w *workspace) pop() candidate {
	top := w.heap[0]
	last := w.heap[len(w.heap)-1]
	w.heap = w.heap[:len(w.heap)-1]
	if len(w.heap) == 0 {
		return top
	}
	i := 0
	for {
		child := 2*i + 1
		if child >= len(w.heap) {
			break
		}
		if child+1 < len(w.heap) && w.heap[child+1].before(w.heap[child]) {
			child++
		}
		if !w.heap[child].before(last) {
			break
		}
		w.heap[i] = w.heap[child]
		i = child
	}
	w.heap[i] = last
	return top
}
