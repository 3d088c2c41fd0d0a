package cache

import (
	"container/list"
	"encoding/binary"
	"errors"
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

// of is the key before the first page of texts of a kind.
func (k Key) of(kind string) Key {
	if kind == "" {
		return k
	}
	return Root(string(k[:]) + kind)
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
	shelf *shelf // where pages go that make room; nil is nowhere
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
	Written, Read     int64 // pages, to disk and back
	Lost              int64 // pages that could not be written or read
	Disk              int64 // bytes of the pages on disk
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

// Keep makes the pool put pages that must make room in dir, at most so many bytes of them, and take in what a pool of the same
// model and layout has left there. It fails with Conflict when another process has dir.
func (p *Pool) Keep(dir string, bytes int64) (err error) {
	p.shelf, err = openShelf(dir, bytes, p.header(), p.layout.PageBytes())
	return err
}

// Close gives the memory back, after what can still be found has been put on disk, where Keep said so. No sequence may be used any more.
func (p *Pool) Close() error {
	var err error
	if p.shelf != nil {
		skip := p.idle.Len() - int(p.shelf.limit/p.shelf.size)
		for e := p.idle.Front(); e != nil; e = e.Next() {
			if page := e.Value.(Page); skip <= 0 {
				p.shelf.put(p.keys[page], p.page(page))
			}
			skip--
		}
		err = p.shelf.close()
	}
	return errors.Join(err, p.memory.Free())
}

// Layout is the shape of the pool's pages.
func (p *Pool) Layout() Layout { return p.layout }

// Free is how many pages can be taken, by giving up idle ones.
func (p *Pool) Free() int { return len(p.free) + p.idle.Len() }

// Stats returns the counts so far.
func (p *Pool) Stats() Stats {
	s := p.stats
	s.Pages, s.Idle = len(p.refs), p.idle.Len()
	s.Used = s.Pages - s.Idle - len(p.free)
	if p.shelf != nil {
		s.Written, s.Read, s.Lost, s.Disk = p.shelf.counts()
	}
	return s
}

func (p *Pool) take() (Page, bool) {
	if len(p.free) == 0 {
		oldest := p.idle.Front()
		if oldest == nil {
			return 0, false
		}
		page := oldest.Value.(Page)
		if p.shelf != nil {
			p.shelf.put(p.keys[page], p.page(page))
		}
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

// bring is find that looks on disk as well.
func (p *Pool) bring(k Key) (Page, bool) {
	if page, ok := p.find(k); ok || p.shelf == nil || !p.shelf.has(k) {
		return page, ok
	}
	page, ok := p.take()
	if !ok {
		return 0, false
	}
	if !p.shelf.get(k, p.page(page)) {
		p.release(page)
		return 0, false
	}
	p.index[k], p.keys[page] = page, k
	return page, true
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
	root   Key
	pages  []Page
	keys   []Key // of the full pages that are published
	tokens []int32
	asked  bool // its text has been counted
}

// NewSequence begins a text. It shares pages with texts of its kind only: those computed alike, the plain way if "".
func (p *Pool) NewSequence(kind string) *Sequence { return &Sequence{pool: p, root: p.root.of(kind)} }

// Len is how many tokens have keys and values.
func (s *Sequence) Len() int { return len(s.tokens) }

// Pages are the pages in order; the slice is valid until the next call.
func (s *Sequence) Pages() []Page { return s.pages }

// Adopt goes on with as many whole pages of tokens as are known, always leaving one token to compute, since the model must say
// what follows it. It returns how many tokens so need not be computed: none unless the sequence ends with a page.
func (s *Sequence) Adopt(tokens []int32) int {
	n, key, before := s.pool.layout.KV.PageLen, s.root, len(s.tokens)
	if len(s.pages)*n != before {
		return 0
	}
	if len(s.keys) > 0 {
		key = s.keys[len(s.keys)-1]
	}
	for len(tokens)-len(s.tokens) > n {
		key = key.next(tokens[len(s.tokens):][:n])
		page, ok := s.pool.bring(key)
		if !ok {
			break
		}
		s.pages, s.keys = append(s.pages, page), append(s.keys, key)
		s.tokens = append(s.tokens, tokens[len(s.tokens):][:n]...)
	}
	found := int64(len(s.tokens) - before)
	s.pool.stats.Hits += found
	s.pool.stats.Misses -= found
	if !s.asked {
		s.pool.stats.Misses += int64(len(tokens))
		s.asked = true
	}
	return len(s.tokens) - before
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
		key := s.root
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
