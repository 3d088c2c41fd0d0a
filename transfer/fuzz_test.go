package transfer

import (
	"bytes"
	"testing"
)

// fuzzBase is what fuzzed deltas refer to.
var fuzzBase = content(20, 40_000)

func seeds(f *testing.F, random bool) {
	for _, next := range [][]byte{nil, fuzzBase, fuzzBase[1:], content(21, 9000), append(bytes.Clone(fuzzBase), fuzzBase[:9000]...)} {
		for _, m := range []Method{Delta, Whole} {
			delta, _ := encodePair(f, pair{old: fuzzBase, next: next}, Options{Random: random, Frame: 2 * pageSize, Method: m})
			f.Add(delta)
		}
	}
}

func FuzzDecode(f *testing.F) {
	seeds(f, false)
	tree, err := HashImage(f.Context(), imageOf(fuzzBase))
	if err != nil {
		f.Fatal(err)
	}
	const most = 1 << 20
	f.Fuzz(func(t *testing.T, delta []byte) {
		out := make(memory, most)
		r, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(fuzzBase), out, DecodeOptions{Base: tree, MaxSize: most})
		if err != nil {
			if !typed(err) {
				t.Fatal(err)
			}
			return
		}
		got, err := HashImage(t.Context(), imageOf(out[:r.Tree.Size()]))
		if err != nil || got.Root() != r.Tree.Root() {
			t.Fatal("what was verified is not what was written", err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	seeds(f, true)
	tree, err := HashImage(f.Context(), imageOf(fuzzBase))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, delta []byte) {
		r, err := Open(t.Context(), bytes.NewReader(delta), int64(len(delta)), imageOf(fuzzBase), tree)
		if err != nil {
			return
		}
		p := make([]byte, 70_000)
		for _, off := range []int64{0, 5, r.Size() / 2, r.Size() - 1} {
			if n, err := r.ReadAt(p, max(0, off)); n < 0 || n > len(p) || n < len(p) && err == nil {
				t.Fatal(n, err)
			}
		}
	})
}

func FuzzParseMap(f *testing.F) {
	l := layout{unit: pageSize, frame: DefaultFrame, next: 100 * pageSize, base: 50*pageSize + 7}
	g := group{first: 3, fromNew: []span{{0, 2}}, fromBase: []span{{1, 1}, {5, 45}}}
	for i, k := range []kind{same, zero, moved, shifted, earlier, literal, literal} {
		g.add(k, int64(i)*pageSize/2*2, pageSize)
	}
	f.Add(int64(3), g.units, g.literals, g.appendMap(nil, pageSize))
	f.Fuzz(func(t *testing.T, first, units, literals int64, b []byte) {
		if first < 0 || first >= l.units() || units < 1 || units > l.units()-first {
			return // callers have checked
		}
		g := group{first: first, units: units, literals: literals}
		if g.parseMap(b, l) != nil {
			return
		}
		again := group{first: first, units: units, literals: literals}
		if err := again.parseMap(g.appendMap(nil, pageSize), l); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzReadIndex(f *testing.F) {
	x, err := BuildIndex(f.Context(), imageOf(fuzzBase))
	if err != nil {
		f.Fatal(err)
	}
	var kept bytes.Buffer
	if _, err := x.WriteTo(&kept); err != nil {
		f.Fatal(err)
	}
	f.Add(kept.Bytes(), 40_000)
	f.Fuzz(func(_ *testing.T, b []byte, size int) {
		_, _ = ReadIndex(bytes.NewReader(b), int64(min(size, 1<<22))) // must not panic
	})
}

func FuzzParseSignature(f *testing.F) {
	s, err := NewSignature(f.Context(), imageOf(fuzzBase), pageSize)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSignature(b)
		if err == nil && !bytes.Equal(s.Append(nil), b) {
			t.Fatal("another signature comes out")
		}
	})
}
