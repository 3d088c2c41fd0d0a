package transfer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// content makes bytes that compress about threefold, as programs and their data do, the same for the same seed.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 400)
	for i := range words {
		words[i] = make([]byte, 2+r.IntN(14))
		for j := range words[i] {
			words[i][j] = byte(r.Uint32())
		}
	}
	b := make([]byte, 0, n+32)
	for len(b) < n {
		b = append(b, words[min(r.IntN(400), r.IntN(400), r.IntN(400))]...)
		if r.IntN(4) == 0 {
			b = append(b, byte(r.Uint32()), byte(r.Uint32()))
		}
	}
	return b[:n]
}

func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// A pair is an old and a new image.
type pair struct {
	name      string
	old, next []byte
}

const mib = 1 << 20

// pairs are cases that real images have in them, with the seed of their content
// and half their size in bytes.
func pairs(seed uint64, half int) []pair {
	a := content(seed, 2*half)
	r := rand.New(rand.NewPCG(seed, 3))
	return []pair{
		{"both empty", nil, nil},
		{"from nothing", nil, content(seed+1, half+17)},
		{"to nothing", a, nil},
		{"one byte", nil, []byte{7}},
		{"identical", a, a},
		{"identical, unaligned", a[:half+1234], a[:half+1234]},
		{"cut short", a, a[:half+999]},
		{"grown", a[:half+77], slices.Concat(a[:half+77], content(seed+2, half/2))},
		{"grown by zeros", a[:half+77], slices.Concat(a[:half+77], make([]byte, half+5))},
		{"all zero", a, make([]byte, 2*half)},
		{"from zero", make([]byte, 2*half), a},
		{"holes", a, holes(a, r)},
		{"inserted in front", a, slices.Concat([]byte("some bytes"), a)},
		{"inserted inside", a, slices.Concat(a[:half+333], content(seed+3, 5001), a[half+333:])},
		{"removed inside", a, slices.Concat(a[:half+333], a[half+half/2+1000:])},
		{"halves swapped", a, slices.Concat(a[half:], a[:half])},
		{"pages shuffled", a, shuffled(a, r)},
		{"few bytes changed on many pages", a, edited(a, r, 100)},
		{"shifted and edited", a, edited(slices.Concat([]byte("x"), a), r, 100)},
		{"repeats itself", a[:half], slices.Concat(content(seed+4, half), edited(content(seed+4, half), r, 40))},
		{"disjoint", a, content(seed+5, 2*half)},
		{"noise", noise(seed, half), noise(seed+1, half+1)},
	}
}

func shuffled(a []byte, r *rand.Rand) []byte {
	out := make([]byte, 0, len(a))
	for _, p := range r.Perm(len(a) / pageSize) {
		out = append(out, a[p*pageSize:(p+1)*pageSize]...)
	}
	return out
}

func edited(a []byte, r *rand.Rand, edits int) []byte {
	out := bytes.Clone(a)
	for range edits {
		out[r.IntN(len(out))] ^= byte(1 + r.IntN(255))
	}
	return out
}

func holes(a []byte, r *rand.Rand) []byte {
	out := bytes.Clone(a)
	for range 40 {
		at := r.IntN(len(out))
		clear(out[at:min(len(out), at+r.IntN(60_000))])
	}
	return out
}

func imageOf(b []byte) Image { return Image{bytes.NewReader(b), int64(len(b))} }

// memory is an Output.
type memory []byte

func (m memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m)) {
		return 0, fmt.Errorf("write of %d bytes at %d of %d", len(p), off, len(m))
	}
	return copy(m[off:], p), nil
}

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }

// encodePair returns the delta of a pair.
func encodePair(t testing.TB, p pair, o Options) ([]byte, Stats) {
	t.Helper()
	var w bytes.Buffer
	s, err := Encode(context.Background(), &w, imageOf(p.old), imageOf(p.next), o)
	if err != nil {
		t.Fatal(err)
	}
	if s.Written != int64(w.Len()) {
		t.Errorf("%d bytes are said to be written, %d are", s.Written, w.Len())
	}
	return w.Bytes(), s
}

// decodesTo fails unless a delta makes the new image of a pair.
func decodesTo(t testing.TB, p pair, delta []byte) {
	t.Helper()
	out := make(memory, len(p.next))
	for i := range out {
		out[i] = 0xAA
	}
	r, err := Decode(context.Background(), bytes.NewReader(delta), imageOf(p.old), out, DecodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, p.next) {
		t.Error("the image is another")
	}
	want, err := HashImage(context.Background(), imageOf(p.next))
	if err != nil {
		t.Fatal(err)
	}
	if r.Tree.Root() != want.Root() || r.Read != int64(len(delta)) {
		t.Errorf("digest %s, want %s; %d bytes were read, want %d", r.Tree.Root(), want.Root(), r.Read, len(delta))
	}
}

// names returns what a directory contains.
func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// blocksAndZstd returns what blocks of 64 KB that the base does not have cost.
func blocksAndZstd(t testing.TB, p pair) int64 {
	t.Helper()
	sig, err := NewSignature(context.Background(), imageOf(p.old), DefaultBlock)
	if err != nil {
		t.Fatal(err)
	}
	s, err := EncodeBlocks(context.Background(), io.Discard, sig, imageOf(p.next), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s.Written
}
