package cache

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

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
	a := p.NewSequence()
	write(t, a, tokens(0, 10)) // two full pages and a half
	b := p.NewSequence()
	if n := b.Adopt(tokens(0, 10)); n != 32 {
		t.Fatalf("%d tokens are shared", n)
	}
	if s := p.Stats(); s.Used != 3 || s.Hits != 32 {
		t.Errorf("%+v", s)
	}
	other := append(tokens(0, 6), tokens(97, 3)...)
	c := p.NewSequence()
	if n := c.Adopt(other); n != 16 {
		t.Errorf("%d tokens of another text are shared", n)
	}
	a.Release()
	b.Release()
	c.Release()
	if s := p.Stats(); s.Used != 0 || s.Idle != 2 {
		t.Errorf("%+v", s)
	}
	if n := p.NewSequence().Adopt(tokens(0, 8)); n != 16 { // the last token must be computed
		t.Errorf("%d", n)
	}
}

func TestTwoThatComputeTheSameKeepOnePage(t *testing.T) {
	p := pool(t, 8)
	a, b := p.NewSequence(), p.NewSequence()
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
		s := p.NewSequence()
		write(t, s, tokens(100*i, 4))
		s.Release()
	}
	again := p.NewSequence()
	again.Adopt(tokens(0, 5)) // now the first is the latest
	again.Release()
	s := p.NewSequence()
	write(t, s, tokens(900, 4))
	if n := p.NewSequence().Adopt(tokens(100, 5)); n != 0 {
		t.Error("the oldest is still there")
	}
	if n := p.NewSequence().Adopt(tokens(0, 5)); n != 16 {
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
			s := p.NewSequence()
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

// conformance: L8
func TestPagesAreFoundAfterARestartUnlessDamaged(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pages")
	p := pool(t, 8)
	s := p.NewSequence()
	write(t, s, tokens(0, 8))
	for i, page := range s.Pages() {
		p.Block(page, 0)[0] = byte(i + 1)
	}
	s.Release()
	if err := p.Write(name, 1<<20); err != nil {
		t.Fatal(err)
	}
	q := pool(t, 8)
	if err := q.Read(name); err != nil {
		t.Fatal(err)
	}
	r := q.NewSequence()
	if n := r.Adopt(tokens(0, 9)); n != 32 || q.Block(r.Pages()[1], 0)[0] != 2 {
		t.Errorf("%d tokens", n)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-20] ^= 1
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d := pool(t, 8)
	if err := d.Read(name); err != nil || d.Stats().Idle != 1 {
		t.Errorf("%v, %+v", err, d.Stats())
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("atoll pages 1 "), 4)
	f.Fuzz(func(t *testing.T, data []byte, keep int) {
		p := pool(t, 4)
		name := filepath.Join(t.TempDir(), "pages")
		if keep%2 == 0 { // past the header
			data = append(p.header(), data...)
		}
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.Read(name); err != nil {
			t.Error(err)
		}
		if s := p.Stats(); s.Used != 0 || s.Idle+len(p.free) != 4 {
			t.Errorf("%+v", s)
		}
	})
}
