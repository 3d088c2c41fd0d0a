package transfer

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
)

func TestAnIndexIsKeptAndReadAgain(t *testing.T) {
	base := slices.Concat(content(1, mib+100), make([]byte, mib), noise(1, 70_001))
	built, err := BuildIndex(t.Context(), imageOf(base))
	if err != nil {
		t.Fatal(err)
	}
	var kept bytes.Buffer
	if n, err := built.WriteTo(&kept); err != nil || n != int64(kept.Len()) {
		t.Fatal(n, err)
	}
	read, err := ReadIndex(bytes.NewReader(kept.Bytes()), int64(len(base)))
	if err != nil {
		t.Fatal(err)
	}
	tree, err := HashImage(t.Context(), imageOf(base))
	if err != nil {
		t.Fatal(err)
	}
	if read.Digest() != tree.Root() || !slices.Equal(read.pages, built.pages) || !slices.Equal(read.anchors, built.anchors) {
		t.Error("another index was read")
	}
	p := pair{old: base, next: slices.Concat([]byte("abc"), base[5000:])}
	want, _ := encodePair(t, p, Options{Index: built})
	if got, _ := encodePair(t, p, Options{Index: read}); !bytes.Equal(got, want) {
		t.Error("it makes another delta")
	}
}

func TestADamagedIndexIsRefused(t *testing.T) {
	base := content(1, 50_000)
	x, err := BuildIndex(t.Context(), imageOf(base))
	if err != nil {
		t.Fatal(err)
	}
	var kept bytes.Buffer
	if _, err := x.WriteTo(&kept); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < kept.Len(); at += thin {
		bad := bytes.Clone(kept.Bytes())
		bad[at] ^= 1 << (at % 8)
		if _, err := ReadIndex(bytes.NewReader(bad), int64(len(base))); !errors.Is(err, ErrIndex) {
			t.Fatalf("byte %d changed: %v", at, err)
		}
		if _, err := ReadIndex(bytes.NewReader(kept.Bytes()[:at]), int64(len(base))); !errors.Is(err, ErrIndex) {
			t.Fatalf("%d bytes: %v", at, err)
		}
	}
	if _, err := ReadIndex(bytes.NewReader(kept.Bytes()), int64(len(base))+1); !errors.Is(err, ErrIndex) {
		t.Error("it is taken for another image's:", err)
	}
	if _, err := x.WriteTo(&failing{100, errors.ErrUnsupported}); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

func TestTablesOfAnIndexAreBounded(t *testing.T) {
	for _, size := range []int64{0, 1, pageSize, mib, 1 << 30, 1 << 31, 1 << 35, maxImage} {
		pages, anchors, thin := tableSizes(size)
		if pages > maxPageSlots || anchors > maxAnchorSlots || pages < 64 || anchors < 64 {
			t.Errorf("%d: %d pages, %d anchors", size, pages, anchors)
		}
		if expected := size >> anchorBits >> thin; expected > int64(anchors) {
			t.Errorf("%d: %d anchors for %d slots", size, expected, anchors)
		}
	}
	// A table that is full drops pages and goes on.
	x := newIndex(0)
	for i := range uint32(1000) {
		x.addPage(uint64(i)<<32|7, i)
	}
	if x.page(5<<32 | 7)[0] != 5*pageSize {
		t.Error("a page was dropped before the table was full")
	}
}

// conformance: W2
func TestBlocksOfABaseThatIsNotHeldAreKnownByTheirHash(t *testing.T) {
	cases := 0
	for _, block := range []int{0, pageSize, maxUnit} {
		for _, p := range pairs(6, mib/thin) {
			if cases++; cases%every != 0 {
				continue
			}
			made, err := NewSignature(t.Context(), imageOf(p.old), block)
			if err != nil {
				t.Fatal(err)
			}
			sig, err := ParseSignature(made.Append(nil))
			if err != nil {
				t.Fatal(p.name, err)
			}
			var w bytes.Buffer
			s, err := EncodeBlocks(t.Context(), &w, sig, imageOf(p.next), Options{})
			if err != nil {
				t.Fatal(p.name, err)
			}
			decodesTo(t, p, w.Bytes())
			if p.name == "identical" && s.Literal > 0 {
				t.Errorf("%d bytes of %s are literal with blocks of %d", s.Literal, p.name, block)
			}
		}
	}
	if _, err := NewSignature(t.Context(), Image{}, 5000); err == nil {
		t.Error("a block of 5000 bytes is taken")
	}
}

func TestADamagedSignatureIsRefused(t *testing.T) {
	s, err := NewSignature(context.Background(), imageOf(content(1, 300_000)), 0)
	if err != nil {
		t.Fatal(err)
	}
	good := s.Append(nil)
	for at := 0; at < len(good); at += thin {
		bad := bytes.Clone(good)
		bad[at] ^= 1 << (at % 8)
		if _, err := ParseSignature(bad); !typed(err) {
			t.Fatalf("byte %d changed: %v", at, err)
		}
		if _, err := ParseSignature(good[:at]); !typed(err) {
			t.Fatalf("%d bytes: %v", at, err)
		}
	}
}
