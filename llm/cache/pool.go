package cache

import (
	"container/list"
	"encoding/binary"
	"slices"

	"github.com/zeebo/blake3"
)

// Key names a full page by all tokens from the beginning up to its end, and by
// what they were computed with.
type Key [16]byte

// Root is the key before the first page, for a model of this digest.
func Root(model string) Key {
	var k Key
	sum := blake3.Sum256([]byte(model))
	copy(k[:], sum[:])
	return k
}

func (k Key) next(tokens []int32) Key {
	b := make([]byte, 0, len(k)+4*len(tokens))
	b = append(b, k[:]...)
	for _, t := range tokens {
		b = binary.LittleEndian.AppendUint32(b, uint32(t))
	}
	sum := blake3.Sum256(b)
	var next Key
	copy(next[:], sum[:])
	return next
}

// Pool hands out the pages of one model. A page that several sequences share is
// full and does not change any more. One that nobody uses stays, to be found by
// its key, until its memory is needed: the least recently used goes first. A pool
// is used by one goroutine at a time.
type Pool struct {
	*store
	root  Key
	refs  []int32
	keys  []Key // of each page; zero when it is not indexed
	free  []Page
	index map[Key]Page
	idle  *list.List // Pages that are indexed and unused; the oldest first
	spot  []*list.Element
	stats Stats
}

// Stats counts what a pool has done.
type Stats struct {
	Pages, Used, Idle int   // of all pages, those in use and those kept for being found
	Hits, Misses      int64 // tokens of prompts that were found, and that had to be computed
	Evicted           int64 // pages
}

// New makes a pool of so many pages, at least one. The root tells models apart.
func New(l Layout, pages int, root Key) (*Pool, error) {
	s, err := newStore(l, pages)
	if err != nil {
		return nil, err
	}
	p := &Pool{
		store: s, root: root, refs: make([]int32, pages), keys: make([]Key, pages), free: make([]Page, pages),
		index: map[Key]Page{}, idle: list.New(), spot: make([]*list.Element, pages),
	}
	for i := range p.free {
		p.free[i] = Page(pages - 1 - i)
	}
	return p, nil
}

// Close gives the memory back. No sequence may be used any more.
func (p *Pool) Close() error { return p.memory.Free() }

// Layout is the shape of the pool's pages.
func (p *Pool) Layout() Layout { return p.layout }

// Free is how many pages can be taken, by giving up idle ones.
func (p *Pool) Free() int { return len(p.free) + p.idle.Len() }

// Stats returns the counts so far.
func (p *Pool) Stats() Stats {
	s := p.stats
	s.Pages, s.Idle = len(p.refs), p.idle.Len()
	s.Used = s.Pages - s.Idle - len(p.free)
	return s
}

func (p *Pool) take() (Page, bool) {
	if len(p.free) == 0 {
		oldest := p.idle.Front()
		if oldest == nil {
			return 0, false
		}
		page := oldest.Value.(Page)
		p.forget(page)
		p.stats.Evicted++
	}
	last := len(p.free) - 1
	page := p.free[last]
	p.free = p.free[:last]
	p.refs[page] = 1
	return page, true
}

// forget makes an idle page free.
func (p *Pool) forget(page Page) {
	p.idle.Remove(p.spot[page])
	p.spot[page] = nil
	delete(p.index, p.keys[page])
	p.keys[page] = Key{}
	p.free = append(p.free, page)
}

// find returns the page of a key, and holds it.
func (p *Pool) find(k Key) (Page, bool) {
	page, ok := p.index[k]
	if ok {
		p.hold(page)
	}
	return page, ok
}

func (p *Pool) hold(page Page) {
	if p.refs[page] == 0 {
		p.idle.Remove(p.spot[page])
		p.spot[page] = nil
	}
	p.refs[page]++
}

func (p *Pool) release(page Page) {
	if p.refs[page]--; p.refs[page] > 0 {
		return
	}
	if p.keys[page] == (Key{}) {
		p.free = append(p.free, page)
		return
	}
	p.spot[page] = p.idle.PushBack(page)
}

// publish lets others find a page that is full. When another page has the same
// tokens, that one is returned and ours released.
func (p *Pool) publish(page Page, k Key) Page {
	if other, ok := p.find(k); ok {
		p.release(page)
		return other
	}
	p.index[k], p.keys[page] = page, k
	return page
}

// Sequence is the pages of one text. The tokens from Len on are not there yet,
// though there may be room for them.
type Sequence struct {
	pool   *Pool
	pages  []Page
	keys   []Key // of the full pages that are published
	tokens []int32
}

// NewSequence begins a text.
func (p *Pool) NewSequence() *Sequence { return &Sequence{pool: p} }

// Len is how many tokens have keys and values.
func (s *Sequence) Len() int { return len(s.tokens) }

// Pages are the pages in order; the slice is valid until the next call.
func (s *Sequence) Pages() []Page { return s.pages }

// Adopt begins with as many whole pages of tokens as are known, always leaving
// one token to compute, since the model must say what follows it. It returns how
// many tokens need not be computed. The sequence must be empty.
func (s *Sequence) Adopt(tokens []int32) int {
	n, key := s.pool.layout.KV.PageLen, s.pool.root
	for len(tokens)-len(s.tokens) > n {
		key = key.next(tokens[len(s.tokens):][:n])
		page, ok := s.pool.find(key)
		if !ok {
			break
		}
		s.pages, s.keys = append(s.pages, page), append(s.keys, key)
		s.tokens = append(s.tokens, tokens[len(s.tokens):][:n]...)
	}
	s.pool.stats.Hits += int64(len(s.tokens))
	s.pool.stats.Misses += int64(len(tokens) - len(s.tokens))
	return len(s.tokens)
}

// Need is how many more pages room for n further tokens takes.
func (s *Sequence) Need(n int) int {
	size := s.pool.layout.KV.PageLen
	return max(0, (len(s.tokens)+n+size-1)/size-len(s.pages))
}

// Grow makes room for n further tokens, or reports that there is none and changes
// nothing.
func (s *Sequence) Grow(n int) bool {
	need := s.Need(n)
	if need > s.pool.Free() {
		return false
	}
	for range need {
		page, _ := s.pool.take() // Free said that there is one
		s.pages = append(s.pages, page)
	}
	return true
}

// Commit says that the keys and values of these further tokens have been written.
func (s *Sequence) Commit(tokens ...int32) {
	s.tokens = append(s.tokens, tokens...)
	n := s.pool.layout.KV.PageLen
	for i := len(s.keys); (i+1)*n <= len(s.tokens); i++ {
		key := s.pool.root
		if i > 0 {
			key = s.keys[i-1]
		}
		key = key.next(s.tokens[i*n:][:n])
		s.pages[i] = s.pool.publish(s.pages[i], key)
		s.keys = append(s.keys, key)
	}
}

// Own is how many pages Release would free or leave to be found: those that no
// other sequence uses.
func (s *Sequence) Own() int {
	n := 0
	for _, page := range s.pages {
		if s.pool.refs[page] == 1 {
			n++
		}
	}
	return n
}

// Release lets all pages go; full ones can still be found.
func (s *Sequence) Release() {
	for _, page := range slices.Backward(s.pages) { // so that the beginning, which more may share, is evicted last
		s.pool.release(page)
	}
	s.pages, s.keys, s.tokens = nil, nil, nil
}
