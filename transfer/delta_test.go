package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
)

// conformance: W2
func TestADeltaMakesTheNewImageOfItsBase(t *testing.T) {
	cases := 0
	for _, p := range pairs(1, mib/thin) {
		for _, m := range []Method{Delta, Dedup, Whole} {
			for _, o := range []Options{{}, {Random: true}, {Frame: 100_000}} {
				if cases++; cases%every != 0 {
					continue
				}
				o.Method = m
				delta, s := encodePair(t, p, o)
				if sum := s.Same + s.Zero + s.Moved + s.Earlier + s.Patched + s.Literal; sum != (int64(len(p.next))+pageSize-1)/pageSize*pageSize {
					t.Errorf("%s, %s: %d bytes are accounted for, of %d", p.name, m, sum, len(p.next))
				}
				decodesTo(t, p, delta)
			}
		}
	}
}

func TestADeltaOfAnyEditsMakesTheNewImage(t *testing.T) {
	base := slices.Concat(content(9, mib/thin), make([]byte, mib/2/thin), noise(9, mib/4/thin), content(10, mib/2/thin))
	for seed := range uint64(30 / every) {
		r := rand.New(rand.NewPCG(seed, 4))
		next := bytes.Clone(base[:r.IntN(len(base))])
		for range r.IntN(12) {
			at, n := r.IntN(len(next)+1), r.IntN(1<<r.IntN(19)+1)
			from := r.IntN(len(base))
			switch piece := base[from:min(len(base), from+n)]; r.IntN(4) {
			case 0: // copy over
				copy(next[at:], piece)
			case 1:
				next = slices.Insert(next, at, piece...)
			case 2:
				next = slices.Delete(next, at, min(len(next), at+n))
			case 3:
				clear(next[at:min(len(next), at+n)])
			}
		}
		p := pair{old: base[:r.IntN(len(base))], next: next}
		delta, _ := encodePair(t, p, Options{Method: Method(r.IntN(2)), Random: r.IntN(2) == 0, Frame: pageSize << r.IntN(11)})
		decodesTo(t, p, delta)
		if t.Failed() {
			t.Fatalf("with seed %d", seed)
		}
	}
}

func TestWhatIsWrittenDependsOnTheImagesOnly(t *testing.T) {
	one, two := content(4, mib/thin), content(3, 2*mib/thin)
	p := pair{old: two, next: edited(slices.Concat(one, two, one), rand.New(rand.NewPCG(3, 3)), 2000/thin)}
	want, _ := encodePair(t, p, Options{Frame: 32 << 10})
	index, err := BuildIndex(context.Background(), imageOf(p.old))
	if err != nil {
		t.Fatal(err)
	}
	for _, procs := range []int{1, 2, 7} {
		before := runtime.GOMAXPROCS(procs)
		for _, x := range []*Index{nil, index} {
			if got, _ := encodePair(t, p, Options{Frame: 32 << 10, Index: x}); !bytes.Equal(got, want) {
				t.Errorf("with %d processors %d bytes, before %d, or others", procs, len(got), len(want))
			}
		}
		runtime.GOMAXPROCS(before)
	}
}

func TestADeltaNeedsNoBaseWhenNoneIsHeld(t *testing.T) {
	p := pair{next: content(5, mib)}
	var w bytes.Buffer
	s, err := Encode(context.Background(), &w, Image{Size: 5}, imageOf(p.next), Options{})
	if err != nil || s.Method != Whole || s.Base != (Digest{}) {
		t.Fatal(s, err)
	}
	decodesTo(t, p, w.Bytes())
}

func TestDeltasFollowEachOtherInAStream(t *testing.T) {
	first, second := pair{next: content(6, mib)}, pair{old: content(6, mib), next: content(7, mib)}
	a, _ := encodePair(t, first, Options{})
	b, _ := encodePair(t, second, Options{})
	decodesTo(t, first, append(slices.Clone(a), b...)[:len(a)])
	out := make(memory, len(first.next))
	if _, err := Decode(context.Background(), io.MultiReader(bytes.NewReader(a), bytes.NewReader(b)), Image{}, out, DecodeOptions{}); err != nil {
		t.Error("what follows a delta disturbs it:", err)
	}
}

// failing fails after some bytes or reads.
type failing struct {
	left int
	err  error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, f.err
	}
	return len(p), nil
}

type failingReader struct {
	io.ReaderAt
	from int64
	err  error
}

func (f failingReader) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

func TestFailuresOfReadersAndWritersArePassedOn(t *testing.T) {
	broken := errors.New("broken")
	ctx := context.Background()
	old, next := content(8, 2*mib), content(9, 2*mib)
	bad := func(b []byte, from int64) Image {
		return Image{failingReader{bytes.NewReader(b), from, broken}, int64(len(b))}
	}
	for name, err := range map[string]error{
		"writer": func() error {
			_, err := Encode(ctx, &failing{mib / 2, broken}, imageOf(old), imageOf(next), Options{Frame: mib / 2})
			return err
		}(),
		"base": func() error {
			_, err := Encode(ctx, io.Discard, bad(old, 3*mib/2), imageOf(next), Options{})
			return err
		}(),
		"new image": func() error {
			_, err := Encode(ctx, io.Discard, imageOf(old), bad(next, 3*mib/2), Options{Frame: mib / 2})
			return err
		}(),
		"signature": func() error { _, err := NewSignature(ctx, bad(old, mib), 0); return err }(),
		"sample":    func() error { _, err := Sample(ctx, imageOf(old), bad(next, mib), nil); return err }(),
	} {
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Encode(ctx, io.Discard, Image{bytes.NewReader(old), int64(len(old)) + 1}, imageOf(next), Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a base that is shorter than was said: %v", err)
	}
}

func TestACancelledContextEndsEverything(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p := pair{old: content(1, 2*mib), next: content(2, 2*mib)}
	delta, _ := encodePair(t, p, Options{})
	_, encode := Encode(ctx, io.Discard, imageOf(p.old), imageOf(p.next), Options{})
	_, decode := Decode(ctx, bytes.NewReader(delta), imageOf(p.old), make(memory, len(p.next)), DecodeOptions{})
	_, index := BuildIndex(ctx, imageOf(p.old))
	_, sample := Sample(ctx, imageOf(p.old), imageOf(p.next), nil)
	for name, err := range map[string]error{"encode": encode, "decode": decode, "index": index, "sample": sample} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	ctx := context.Background()
	one, two := imageOf(content(1, mib)), imageOf(content(1, 2*mib))
	index, err := BuildIndex(ctx, two)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]Options{"small frame": {Frame: 100}, "large frame": {Frame: 1 << 30}, "another's index": {Index: index}} {
		if _, err := Encode(ctx, io.Discard, one, two, o); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if _, err := Encode(ctx, io.Discard, one, Image{At: one.At, Size: maxImage + 1}, Options{}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	for _, m := range []Method{Delta, Dedup, Whole} {
		if got, err := ParseMethod(m.String()); got != m || err != nil {
			t.Error(got, err)
		}
	}
	if _, err := ParseMethod("rsync"); err == nil {
		t.Error("any method is taken")
	}
}
