package transfer

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func TestAPatchMakesThePage(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	old := content(1, pageSize)
	for _, places := range [][]int{{}, {0}, {pageSize - 1}, {0, 1, 2, 3}, {7, 8, 9}, {100, 103, 108, 4000}, {0, pageSize - 1}} {
		page := bytes.Clone(old)
		for _, at := range places {
			page[at] ^= byte(1 + r.IntN(255))
		}
		p, ok := diff(page, old)
		if !ok {
			t.Fatalf("%v: no patch", places)
		}
		got := bytes.Clone(old)
		p.apply(got)
		if !bytes.Equal(got, page) {
			t.Errorf("%v: another page", places)
		}
	}
	for range 300 {
		page := edited(old, r, 1+r.IntN(100))
		p, ok := diff(page, old)
		if !ok {
			continue
		}
		if len(p.changes)+len(p.data) > maxPatch+2 {
			t.Fatalf("a patch of %d bytes", len(p.changes)+len(p.data))
		}
		got := bytes.Clone(old)
		if p.apply(got); !bytes.Equal(got, page) {
			t.Fatal("another page")
		}
	}
	if _, ok := diff(noise(1, pageSize), noise(2, pageSize)); ok {
		t.Error("what has nothing in common is patched")
	}
}

func TestPatchesThatMakeNoSenseAreRefused(t *testing.T) {
	for name, b := range map[string][]byte{
		"nothing":          {},
		"beyond the unit":  {1, 0xff, 0x1f, 5, 1, 2, 3, 4, 5, 6},
		"too long":         {1, 0, 0xff, 0x7f},
		"data is missing":  {1, 0, 9, 1, 2, 3},
		"too many changes": {0xff, 0xff, 0x7f},
		"cut":              {2, 0, 0},
	} {
		c := cursor{b: b}
		if c.patches(1, pageSize); c.err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}
