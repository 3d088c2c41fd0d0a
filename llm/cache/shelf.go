package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// A shelf keeps pages on disk, as chunks: those that had to make room in memory, and from one start to the next. It is a
// cache: what does not fit, is damaged or was not written when the process died is computed again, and never an error.
//
// Pages are written by a goroutine of its own, from copies of which there are at most queued. The list of what there is, the
// index, is a chunk too, to which a ref leads; it is written after each indexEvery pages and by close. Chunks that it does not
// name are removed when the shelf is opened again.
type shelf struct {
	store *chunk.Disk
	head  []byte // what the pages belong to
	limit int64  // bytes of pages
	size  int64  // bytes of a page
	queue chan shelved
	done  chan struct{}

	mu    sync.Mutex
	pages map[Key]*shelved
	order []Key // the longest unused first
	sum   int64 // bytes of all pages

	written, read, lost int64
}

// shelved is a page on its way to the disk, or on it.
type shelved struct {
	key  Key
	data []byte     // nil once it is on disk
	ids  []chunk.ID // of its pieces
}

const (
	queued     = 8  // pages that wait to be written
	indexEvery = 64 // pages
	indexRef   = "pages"
	maxPieces  = 1 << 10 // of a page
)

// openShelf opens the pages in dir that belong to head, of size bytes each, and keeps at most limit bytes. Others are removed.
// It fails with Conflict when another process has the directory.
func openShelf(dir string, limit int64, head []byte, size int64) (*shelf, error) {
	store, err := chunk.OpenDisk(dir, chunk.DiskOptions{})
	if err != nil {
		return nil, err
	}
	s := &shelf{store: store, head: head, limit: limit, size: size, pages: map[Key]*shelved{}, queue: make(chan shelved, queued), done: make(chan struct{})}
	ctx := context.Background()
	if refs, err := store.Refs(ctx); err == nil {
		if data, err := store.Get(ctx, refs[indexRef]); err == nil {
			s.take(data)
		}
	}
	if err := s.removeOthers(ctx); err != nil {
		return nil, sandbox.E("cache.openShelf", "", dir, errors.Join(err, store.Close()))
	}
	go s.write()
	return s, nil
}

// take reads an index as far as it is one of these pages.
func (s *shelf) take(data []byte) {
	if len(data) < len(s.head) || string(data[:len(s.head)]) != string(s.head) {
		return
	}
	data = data[len(s.head):]
	for len(data) >= len(Key{})+2 {
		e := &shelved{key: Key(data)}
		n := int(binary.LittleEndian.Uint16(data[len(Key{}):]))
		data = data[len(Key{})+2:]
		if n == 0 || n > maxPieces || len(data) < n*len(chunk.ID{}) {
			return
		}
		for range n {
			e.ids = append(e.ids, chunk.ID(data))
			data = data[len(chunk.ID{}):]
		}
		if s.pages[e.key] == nil && e.key != (Key{}) && s.sum+s.size <= s.limit {
			s.pages[e.key], s.order, s.sum = e, append(s.order, e.key), s.sum+s.size
		}
	}
}

// index is what take reads: the pages used last, as many as a chunk names. mu is held.
func (s *shelf) index() []byte {
	b := append([]byte(nil), s.head...)
	var list []byte
	for _, key := range slices.Backward(s.order) {
		e := s.pages[key]
		if e.data != nil {
			continue
		}
		entry := binary.LittleEndian.AppendUint16(append([]byte(nil), key[:]...), uint16(len(e.ids))) // at most maxPieces
		for _, id := range e.ids {
			entry = append(entry, id[:]...)
		}
		if len(b)+len(list)+len(entry) > chunk.MaxSize {
			break
		}
		list = append(entry, list...)
	}
	return append(b, list...)
}

// removeOthers removes chunks that no page has.
func (s *shelf) removeOthers(ctx context.Context) error {
	known := map[chunk.ID]bool{}
	for _, e := range s.pages {
		for _, id := range e.ids {
			known[id] = true
		}
	}
	var others []chunk.ID
	err := s.store.Each(ctx, func(e chunk.Entry) error {
		if !known[e.ID] {
			others = append(others, e.ID)
		}
		return nil
	})
	for _, id := range others {
		if err == nil {
			err = s.store.Delete(ctx, id)
		}
	}
	return err
}

// put copies a page. It waits while too many copies are to be written: computing them again would take longer.
func (s *shelf) put(key Key, data []byte) {
	s.mu.Lock()
	known := s.pages[key] != nil
	s.touch(key)
	if known || s.size > s.limit {
		s.mu.Unlock()
		return
	}
	e := &shelved{key: key, data: slices.Clone(data)}
	s.pages[key], s.order, s.sum = e, append(s.order, key), s.sum+s.size
	s.mu.Unlock()
	s.queue <- *e
}

// touch makes a page the one used last. mu is held.
func (s *shelf) touch(key Key) {
	if i := slices.Index(s.order, key); i >= 0 {
		s.order = append(slices.Delete(s.order, i, i+1), key)
	}
}

// has tells whether a page is there.
func (s *shelf) has(key Key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pages[key] != nil
}

// get reads a page into data and tells whether it was there.
func (s *shelf) get(key Key, data []byte) bool {
	s.mu.Lock()
	e := s.pages[key]
	if e == nil {
		s.mu.Unlock()
		return false
	}
	s.touch(key)
	ids, copied := e.ids, e.data
	s.mu.Unlock()
	at := copy(data, copied)
	for _, id := range ids {
		piece, err := s.store.Get(context.Background(), id)
		if err != nil || at+len(piece) > len(data) {
			break
		}
		at += copy(data[at:], piece)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at < len(data) { // gone or damaged
		s.drop(key)
		s.lost++
		return false
	}
	s.read++
	return true
}

// drop forgets a page. mu is held.
func (s *shelf) drop(key Key) {
	e := s.pages[key]
	if e == nil {
		return
	}
	delete(s.pages, key)
	s.order = slices.DeleteFunc(s.order, func(k Key) bool { return k == key })
	s.sum -= s.size
	for _, id := range e.ids {
		_ = s.store.Delete(context.Background(), id) // one that stays is removed when the shelf is opened again
	}
}

// write writes what is queued until the queue is closed.
func (s *shelf) write() {
	defer close(s.done)
	n := 0
	for e := range s.queue {
		s.mu.Lock()
		for s.sum > s.limit && len(s.order) > 0 && s.order[0] != e.key { // the longest unused makes room
			s.drop(s.order[0])
		}
		wanted := s.pages[e.key] != nil // it may have had to make room itself
		s.mu.Unlock()
		if !wanted {
			continue
		}
		var ids []chunk.ID
		var err error
		for piece := range slices.Chunk(e.data, chunk.CutSize) {
			var id chunk.ID
			if id, err = s.store.Put(context.Background(), piece); err != nil {
				break
			}
			ids = append(ids, id)
		}
		s.mu.Lock()
		s.pages[e.key].ids, s.pages[e.key].data = ids, nil // nothing drops a page that is being written
		if s.written++; err != nil {
			s.drop(e.key)
			s.written--
			s.lost++
		}
		s.mu.Unlock()
		if n++; n%indexEvery == 0 {
			s.writeIndex()
		}
	}
	s.writeIndex()
}

func (s *shelf) writeIndex() {
	s.mu.Lock()
	b := s.index()
	s.mu.Unlock()
	ctx := context.Background()
	refs, _ := s.store.Refs(ctx)
	id, err := s.store.Put(ctx, b)
	if err == nil {
		err = s.store.SetRef(ctx, indexRef, id)
	}
	if old := refs[indexRef]; err == nil && old != id && old != (chunk.ID{}) {
		_ = s.store.Delete(ctx, old) // or it goes when the shelf is opened again
	}
}

// counts returns the pages written, read and lost so far, and how many bytes all take.
func (s *shelf) counts() (written, read, lost, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written, s.read, s.lost, s.sum
}

// close writes what is queued.
func (s *shelf) close() error {
	close(s.queue)
	<-s.done
	return s.store.Close()
}

// header says what pages belong to.
func (p *Pool) header() []byte {
	l := p.layout
	return fmt.Appendf(nil, "atoll pages 2 %x %d %d %d %d %d\n", p.root, l.Layers, l.KV.Type, l.KV.Heads, l.KV.HeadDim, l.KV.PageLen)
}
