package cache

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

func pool(t *testing.T, pages int) *Pool {
	t.Helper()
	p, err := New(Layout{Layers: 2, KV: tensor.KVShape{Type: tensor.F16, Heads: 2, HeadDim: 16, PageLen: 16}}, pages, Root("m"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// tokens are n quarters of a page, so that the tests can count in small numbers.
func tokens(from, n int) []int32 {
	from, n = 4*from, 4*n
	ts := make([]int32, n)
	for i := range ts {
		ts[i] = int32(from + i)
	}
	return ts
}

func write(t *testing.T, s *Sequence, ts []int32) {
	t.Helper()
	if !s.Grow(len(ts)) {
		t.Fatal("no room")
	}
	s.Commit(ts...)
}

// conformance: L5
func TestSequencesThatBeginAlikeSharePages(t *testing.T) {
	p := pool(t, 8)
	a := p.NewSequence("")
	write(t, a, tokens(0, 10)) // two full pages and a half
	b := p.NewSequence("")
	if n := b.Adopt(tokens(0, 10)); n != 32 {
		t.Fatalf("%d tokens are shared", n)
	}
	if s := p.Stats(); s.Used != 3 || s.Hits != 32 {
		t.Errorf("%+v", s)
	}
	other := append(tokens(0, 6), tokens(97, 3)...)
	c := p.NewSequence("")
	if n := c.Adopt(other); n != 16 {
		t.Errorf("%d tokens of another text are shared", n)
	}
	a.Release()
	b.Release()
	c.Release()
	if s := p.Stats(); s.Used != 0 || s.Idle != 2 {
		t.Errorf("%+v", s)
	}
	if n := p.NewSequence("").Adopt(tokens(0, 8)); n != 16 { // the last token must be computed
		t.Errorf("%d", n)
	}
}

func TestTwoThatComputeTheSameKeepOnePage(t *testing.T) {
	p := pool(t, 8)
	a, b := p.NewSequence(""), p.NewSequence("")
	if !a.Grow(16) || !b.Grow(16) {
		t.Fatal("no room")
	}
	a.Commit(tokens(0, 4)...)
	b.Commit(tokens(0, 4)...)
	if a.Pages()[0] != b.Pages()[0] || p.Stats().Used != 1 {
		t.Errorf("%v %v %+v", a.Pages(), b.Pages(), p.Stats())
	}
}

func TestIdlePagesGoLeastRecentlyUsedFirst(t *testing.T) {
	p := pool(t, 3)
	for i := range 3 {
		s := p.NewSequence("")
		write(t, s, tokens(100*i, 4))
		s.Release()
	}
	again := p.NewSequence("")
	again.Adopt(tokens(0, 5)) // now the first is the latest
	again.Release()
	s := p.NewSequence("")
	write(t, s, tokens(900, 4))
	if n := p.NewSequence("").Adopt(tokens(100, 5)); n != 0 {
		t.Error("the oldest is still there")
	}
	if n := p.NewSequence("").Adopt(tokens(0, 5)); n != 16 {
		t.Error("the latest is gone")
	}
	if s.Grow(100) || p.Stats().Evicted != 1 {
		t.Error("room that is not there")
	}
}

// Whatever sequences do, every page is in exactly one of the three states.
func TestPagesAreNeitherLostNorCountedTwice(t *testing.T) {
	p := pool(t, 16)
	rnd := rand.New(rand.NewPCG(3, 4))
	var live []*Sequence
	for range 5000 {
		switch {
		case len(live) < 5 && rnd.IntN(2) == 0:
			s := p.NewSequence("")
			s.Adopt(tokens(rnd.IntN(3), 1+rnd.IntN(12)))
			live = append(live, s)
		case len(live) > 0:
			i := rnd.IntN(len(live))
			if n := 1 + rnd.IntN(5); rnd.IntN(3) > 0 && live[i].Grow(4*n) {
				live[i].Commit(tokens(live[i].Len()/4, n)...)
				continue
			}
			live[i].Release()
			live = append(live[:i], live[i+1:]...)
		}
		held := map[Page]int32{}
		for _, s := range live {
			for _, page := range s.Pages() {
				held[page]++
			}
		}
		for page, refs := range p.refs {
			if refs != held[Page(page)] {
				t.Fatalf("page %d has %d references, and %d hold it", page, refs, held[Page(page)])
			}
		}
		if s := p.Stats(); s.Used != len(held) || s.Used+p.Free() != 16 {
			t.Fatalf("%+v, %d held", s, len(held))
		}
	}
}

// conformance: L8
func TestAnswersAreKeptWithinTheirBoundAndFoundAfterARestart(t *testing.T) {
	dir := t.TempDir()
	a, err := OpenAnswers(dir, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		a.Put(string(rune('a'+i)), make([]byte, 100))
		a.Get("a") // stays the latest used
	}
	if _, ok := a.Get("a"); !ok {
		t.Error("the one in use is gone")
	}
	if _, ok := a.Get("b"); ok {
		t.Error("the oldest is there")
	}
	a.Put("large", make([]byte, 600))
	again, err := OpenAnswers(dir, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if data, ok := again.Get("t"); !ok || len(data) != 100 {
		t.Error("the latest is not found after a restart")
	}
	if _, ok := again.Get("large"); ok {
		t.Error("one that takes more than half was kept")
	}
	if hits, misses := again.Counts(); hits != 1 || misses != 1 || again.sum > 1000 {
		t.Errorf("%d, %d, %d bytes", hits, misses, again.sum)
	}
}

// keep is a pool that puts pages in dir.
func keep(t *testing.T, pages int, dir string, bytes int64) *Pool {
	t.Helper()
	p, err := New(Layout{Layers: 2, KV: tensor.KVShape{Type: tensor.F16, Heads: 2, HeadDim: 16, PageLen: 16}}, pages, Root("m"))
	if err == nil {
		err = p.Keep(dir, bytes)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fill writes a text and marks its pages.
func fill(t *testing.T, p *Pool, ts []int32, mark byte) {
	t.Helper()
	s := p.NewSequence("")
	write(t, s, ts)
	for i, page := range s.Pages() {
		p.Block(page, 1)[5] = mark + byte(i)
	}
	s.Release()
}

// expect adopts a text and looks at its marks.
func expect(t *testing.T, p *Pool, ts []int32, n int, mark byte) {
	t.Helper()
	s := p.NewSequence("")
	defer s.Release()
	if got := s.Adopt(ts); got != n {
		t.Errorf("%d tokens are known, want %d", got, n)
	}
	for i, page := range s.Pages() {
		if got := p.Block(page, 1)[5]; got != mark+byte(i) {
			t.Errorf("page %d holds %d", i, got)
		}
	}
}

// conformance: L5 L8
func TestPagesThatMadeRoomComeBackFromDisk(t *testing.T) {
	p := keep(t, 4, t.TempDir(), 1<<20)
	defer p.Close()
	for i := range 10 {
		fill(t, p, tokens(100*i, 12), byte(10*i))
	}
	for i := range 10 {
		expect(t, p, tokens(100*i, 13), 48, byte(10*i))
	}
	if s := p.Stats(); s.Used != 0 || s.Idle+len(p.free) != 4 || s.Read < 24 {
		t.Errorf("%+v", s)
	}
}

// conformance: L8
func TestPagesAreFoundAfterARestartUnlessDamaged(t *testing.T) {
	dir := t.TempDir()
	p := keep(t, 8, dir, 1<<20)
	fill(t, p, tokens(0, 8), 1)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	q := keep(t, 8, dir, 1<<20)
	expect(t, q, tokens(0, 9), 32, 1)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	chunks, err := filepath.Glob(filepath.Join(dir, "chunks", "*", "*"))
	if err != nil || len(chunks) != 3 {
		t.Fatalf("two pages and an index are %q, %v", chunks, err)
	}
	for _, name := range chunks {
		if info, err := os.Stat(name); err != nil || info.Size() < 1000 { // the index
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)-20] ^= 1
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := keep(t, 8, dir, 1<<20)
	defer d.Close()
	expect(t, d, tokens(0, 9), 0, 0)
	if s := d.Stats(); s.Lost != 1 || s.Used != 0 || s.Idle != 0 {
		t.Errorf("%+v", s)
	}
}

// A process that was killed leaves pages that no index names, and half a page; the next one removes them and finds the rest.
func TestWhatAKilledProcessLeftIsRemovedOrFound(t *testing.T) {
	dir := t.TempDir()
	p := keep(t, 1, dir, 1<<20)
	for i := range indexEvery + 5 {
		fill(t, p, tokens(100*i, 4), byte(i))
	}
	killed := t.TempDir()
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil { // as the disk is while the pool lives
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(killed, "tmp", "half"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	q := keep(t, 4, killed, 1<<20)
	defer q.Close()
	if s := q.Stats(); s.Disk != 0 {
		expect(t, q, tokens(0, 5), 16, 0)
	}
	if again, err := New(q.layout, 1, Root("m")); err != nil {
		t.Fatal(err)
	} else {
		if err := again.Keep(killed, 1<<20); !sandbox.Is(err, sandbox.Conflict) {
			t.Errorf("a second process has the directory as well: %v", err)
		}
		_ = again.memory.Free()
	}
}

func TestPagesOnDiskStayWithinTheirBoundAndBelongToOneModel(t *testing.T) {
	dir := t.TempDir()
	p := keep(t, 2, dir, 0)
	page := p.layout.PageBytes()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = keep(t, 2, dir, 5*page)
	for i := range 20 {
		fill(t, p, tokens(100*i, 4), byte(i))
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	q := keep(t, 8, dir, 5*page)
	expect(t, q, tokens(0, 5), 0, 0)
	expect(t, q, tokens(1900, 5), 16, 19)
	if s := q.Stats(); s.Disk > 5*page {
		t.Errorf("%+v", s)
	}
	q.root = Root("another")
	if err := q.shelf.close(); err != nil {
		t.Fatal(err)
	}
	if err := q.Keep(dir, 5*page); err != nil {
		t.Fatal(err)
	}
	if s := q.Stats(); s.Disk != 0 {
		t.Errorf("another model finds %+v", s)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte("x"))
	f.Add(append(bytes.Repeat([]byte{1}, 17), make([]byte, 40)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &shelf{head: []byte("x"), limit: 100, size: 30, pages: map[Key]*shelved{}}
		s.take(append([]byte("x"), data...))
		if len(s.pages) != len(s.order) || s.sum != 30*int64(len(s.order)) || s.sum > s.limit {
			t.Errorf("%d pages, %d in order, %d bytes", len(s.pages), len(s.order), s.sum)
		}
		again := &shelf{head: s.head, limit: 100, size: 30, pages: map[Key]*shelved{}}
		again.take(s.index())
		if len(again.order) != len(s.order) {
			t.Errorf("%d of %d pages are read again", len(again.order), len(s.order))
		}
	})
}
