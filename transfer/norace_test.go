//go:build !race

package transfer

import "testing"

const (
	thin  = 1 // divides inputs and the places that are damaged in them
	every = 1 // of so many cases one is tried
)

// The tests of this file are about figures, which need inputs of some size.

// Figures are bytes, so that they are the same everywhere.
//
// conformance: W2
func TestADeltaIsSmallerThanBlocksAndZstd(t *testing.T) {
	// How many times fewer bytes at least; where nothing can be found, hardly more.
	least := map[string]float64{
		"cut short": 5, "holes": 20, "inserted in front": 1000, "inserted inside": 80, "removed inside": 500,
		"pages shuffled": 400, "few bytes changed on many pages": 500, "shifted and edited": 500,
	}
	for _, p := range pairs(2, mib) {
		delta, s := encodePair(t, p, Options{})
		blocks := blocksAndZstd(t, p)
		t.Logf("measured: W2 %s: delta %d bytes, blocks of 64 KB and zstd %d bytes", p.name, len(delta), blocks)
		if f := least[p.name]; float64(blocks) < f*float64(len(delta)) || float64(blocks) < 0.98*float64(len(delta))-5 {
			t.Errorf("%s: %d bytes, and %d with blocks; want %.1f times fewer; %+v", p.name, len(delta), blocks, f, s)
		}
		if len(p.next) > 0 && len(delta) > len(p.next)+len(p.next)/500+400 {
			t.Errorf("%s: %d bytes for %d", p.name, len(delta), len(p.next))
		}
	}
}

func TestADeltaForRandomAccessCostsLittle(t *testing.T) {
	for _, p := range pairs(2, mib) {
		plain, _ := encodePair(t, p, Options{})
		random, _ := encodePair(t, p, Options{Random: true})
		if p.name != "repeats itself" && len(random) > len(plain)+len(plain)/10+100 {
			t.Errorf("%s: %d bytes, %d for random access", p.name, len(plain), len(random))
		}
	}
}

// conformance: W2
func TestASamplePredictsWhatEncodingMakes(t *testing.T) {
	for _, p := range pairs(7, mib) {
		index, err := BuildIndex(t.Context(), imageOf(p.old))
		if err != nil {
			t.Fatal(err)
		}
		s, err := Sample(t.Context(), imageOf(p.old), imageOf(p.next), index)
		if err != nil {
			t.Fatal(p.name, err)
		}
		if sum := s.Same + s.Zero + s.Moved + s.Shifted + s.Patched + s.Novel; sum < 0.999 || sum > 1.001 {
			t.Errorf("%s: fractions add up to %f: %+v", p.name, sum, s)
		}
		if p.name == "repeats itself" { // a sample knows nothing of that
			continue
		}
		for _, e := range Predict(s, Link{mbit}, DefaultMachine(1)) {
			made, _ := encodePair(t, p, Options{Method: e.Method, Index: index})
			if n := int64(len(made)); e.Bytes > 2*n+10_000 || 2*e.Bytes+10_000 < n {
				t.Errorf("%s by %s: %d bytes are predicted, %d made: %+v", p.name, e.Method, e.Bytes, n, s)
			}
		}
	}
	s, err := Sample(t.Context(), Image{}, imageOf(content(1, mib)), nil)
	if err != nil || s.Novel != 1 || Predicted.Choose(s, Link{mbit}, DefaultMachine(2)) != Whole {
		t.Errorf("%+v, %v", s, err)
	}
}
