package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// small is a pair whose delta has all kinds of runs and several groups.
func small() (pair, Options) {
	r := rand.New(rand.NewPCG(11, 11))
	a, b := content(11, 200_000), content(12, 60_000)
	next := slices.Concat(a[40_960:81_920], edited(a[:40_960], r, 5), make([]byte, 20_000), b, b[:40_960], a[100_001:180_000])
	return pair{"small", a, next}, Options{Frame: 8 * pageSize}
}

func typed(err error) bool {
	for _, kind := range []error{ErrCorrupt, ErrTruncated, ErrVersion, ErrWrongBase, ErrTooLarge} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

func TestDamageIsFoundWhereverItIs(t *testing.T) {
	p, o := small()
	for _, random := range []bool{false, true} {
		o.Random = random
		delta, _ := encodePair(t, p, o)
		tree, err := HashImage(t.Context(), imageOf(p.old))
		if err != nil {
			t.Fatal(err)
		}
		// What lies in the middle of a large frame is under the same hash as its ends.
		for at := 0; at < len(delta); at += thin * (1 + len(delta)/3000) {
			bad := bytes.Clone(delta)
			bad[at] ^= 1 << (at % 8)
			_, err := Decode(t.Context(), bytes.NewReader(bad), imageOf(p.old), make(memory, len(p.next)), DecodeOptions{Base: tree, MaxSize: int64(len(p.next))})
			if !typed(err) {
				t.Fatalf("byte %d of %d changed: %v", at, len(delta), err)
			}
		}
	}
}

func TestADeltaThatEndsEarlyIsFound(t *testing.T) {
	p, o := small()
	delta, _ := encodePair(t, p, o)
	tree, err := HashImage(t.Context(), imageOf(p.old))
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(delta); n += thin * (1 + len(delta)/2000) {
		_, err := Decode(t.Context(), bytes.NewReader(delta[:n]), imageOf(p.old), make(memory, len(p.next)), DecodeOptions{Base: tree})
		if !errors.Is(err, ErrTruncated) {
			t.Fatalf("%d of %d bytes: %v", n, len(delta), err)
		}
	}
}

// conformance: W2
func TestAnotherBaseIsRefused(t *testing.T) {
	p, o := small()
	o.Random = true
	delta, _ := encodePair(t, p, o)
	other := bytes.Clone(p.old)
	other[len(other)-1]++
	known, err := HashImage(t.Context(), imageOf(p.old))
	if err != nil {
		t.Fatal(err)
	}
	stale, err := HashImage(t.Context(), imageOf(other))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		base Image
		tree *Tree
	}{
		"none": {}, "another": {imageOf(other), nil}, "longer": {imageOf(append(bytes.Clone(p.old), 0)), nil},
		"shorter": {imageOf(p.old[1:]), nil}, "with another tree": {imageOf(p.old), stale},
	} {
		if _, err := Decode(t.Context(), bytes.NewReader(delta), c.base, make(memory, len(p.next)), DecodeOptions{Base: c.tree}); !errors.Is(err, ErrWrongBase) {
			t.Errorf("%s: decoding: %v", name, err)
		}
		if _, err := Open(t.Context(), bytes.NewReader(delta), int64(len(delta)), c.base, c.tree); !errors.Is(err, ErrWrongBase) {
			t.Errorf("%s: opening: %v", name, err)
		}
	}
	// A base that is not what its tree says is found by what it makes.
	if _, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(noise(1, len(p.old))), make(memory, len(p.next)), DecodeOptions{Base: known}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

func TestAnImageThatIsTooLargeOrNotWantedIsRefused(t *testing.T) {
	p, o := small()
	delta, s := encodePair(t, p, o)
	size := int64(len(p.next))
	if _, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(p.old), make(memory, size), DecodeOptions{MaxSize: size - 1}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if _, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(p.old), make(memory, size), DecodeOptions{Want: Digest{1}}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	if _, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(p.old), make(memory, size), DecodeOptions{Want: s.New, MaxSize: size}); err != nil {
		t.Error(err)
	}
}

func TestOutputThatFailsIsPassedOn(t *testing.T) {
	p, o := small()
	delta, _ := encodePair(t, p, o)
	if _, err := Decode(t.Context(), bytes.NewReader(delta), imageOf(p.old), make(memory, len(p.next)-1), DecodeOptions{}); err == nil || typed(err) {
		t.Error(err)
	}
}

// conformance: W2
func TestAFileAppearsWholeOrNotAtAll(t *testing.T) {
	p, o := small()
	delta, _ := encodePair(t, p, o)
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, []byte("what was there"), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(delta)
	bad[len(bad)-20]++ // all of the image is decoded before that is read
	if _, err := DecodeFile(t.Context(), bytes.NewReader(bad), imageOf(p.old), path, DecodeOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "what was there" || len(names(t, dir)) != 1 {
		t.Errorf("%q, %v, beside %v", got, err, names(t, dir))
	}
	if _, err := DecodeFile(t.Context(), bytes.NewReader(delta), imageOf(p.old), path, DecodeOptions{}); err != nil {
		t.Fatal(err)
	}
	m, file, err := OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	got := make([]byte, m.Size)
	if err := m.read(got, 0); err != nil || !bytes.Equal(got, p.next) || len(names(t, dir)) != 1 {
		t.Errorf("%d bytes, %v, beside %v", len(got), err, names(t, dir))
	}
	if _, _, err := OpenImage(dir); err == nil {
		t.Error("a directory is an image")
	}
}

func TestAFileIsSparseWhereItIsZero(t *testing.T) {
	p := pair{next: slices.Concat(content(1, 10_000), make([]byte, 3*mib), content(2, 5000), make([]byte, 3*mib+1))}
	delta, _ := encodePair(t, p, Options{})
	path := filepath.Join(t.TempDir(), "image")
	if _, err := DecodeFile(t.Context(), bytes.NewReader(delta), Image{}, path, DecodeOptions{}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, p.next) {
		t.Fatal(len(got), err)
	}
	if used := allocated(t, path); used > mib {
		t.Errorf("%d bytes are allocated for 15 KB", used)
	}
}

func TestAReaderReadsAnywhere(t *testing.T) {
	for i, p := range append(pairs(4, mib/thin), func() pair { p, _ := small(); return p }()) {
		if (i+1)%every != 0 {
			continue
		}
		delta, s := encodePair(t, p, Options{Random: true, Frame: 64 << 10})
		r, err := Open(t.Context(), bytes.NewReader(delta), int64(len(delta)), imageOf(p.old), nil)
		if err != nil {
			t.Fatal(p.name, err)
		}
		if r.Size() != int64(len(p.next)) || r.Digest() != s.New {
			t.Errorf("%s: %d bytes, %s", p.name, r.Size(), r.Digest())
		}
		done := make(chan error)
		for seed := range uint64(4) {
			go func() { done <- readAround(r, p.next, seed) }()
		}
		for range 4 {
			if err := <-done; err != nil {
				t.Fatal(p.name, err)
			}
		}
	}
}

// readAround compares what a reader says with the image at random places, and all of it.
func readAround(r *Reader, next []byte, seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 5))
	for i := range 30 {
		off, n := rnd.IntN(len(next)+100), rnd.IntN(50_000)
		if i == 0 {
			off, n = 0, len(next)+1
		}
		p := make([]byte, n)
		got, err := r.ReadAt(p, int64(off))
		want := next[min(off, len(next)):min(off+n, len(next))]
		if !bytes.Equal(p[:got], want) || got < n && !errors.Is(err, io.EOF) || got == n && err != nil {
			return errors.Join(errors.New("other bytes"), err)
		}
	}
	return nil
}

func TestAReaderFindsDamage(t *testing.T) {
	p, o := small()
	o.Random = true
	delta, _ := encodePair(t, p, o)
	tree, err := HashImage(t.Context(), imageOf(p.old))
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, len(p.next))
	for at := 0; at < len(delta); at += thin * (1 + len(delta)/2000) {
		bad := bytes.Clone(delta)
		bad[at] ^= 1 << (at % 8)
		r, err := Open(t.Context(), bytes.NewReader(bad), int64(len(bad)), imageOf(p.old), tree)
		if err == nil {
			_, err = r.ReadAt(all, 0)
		}
		if !typed(err) && !errors.Is(err, ErrNoRandom) {
			t.Fatalf("byte %d of %d changed: %v", at, len(delta), err)
		}
	}
	for n := 0; n < len(delta); n += 100 * thin {
		if _, err := Open(t.Context(), bytes.NewReader(delta[:n]), int64(n), imageOf(p.old), tree); !typed(err) {
			t.Fatalf("%d of %d bytes: %v", n, len(delta), err)
		}
	}
	o.Random = false
	delta, _ = encodePair(t, p, o)
	if _, err := Open(context.Background(), bytes.NewReader(delta), int64(len(delta)), imageOf(p.old), tree); !errors.Is(err, ErrNoRandom) {
		t.Error(err)
	}
}
