package tensor

import (
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"testing"
)

// Another implementation's reading of the same bytes; see testdata/blocks.py.
func TestBlocksAreReadAsLlamaCppsOwnPackageReadsThem(t *testing.T) {
	b, err := os.ReadFile("testdata/blocks.json")
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]struct {
		Bytes string
		Bits  []uint32
	}
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	for name, want := range all {
		typ, err := ParseType(name)
		if err != nil {
			t.Fatal(err)
		}
		src, err := hex.DecodeString(want.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]float32, len(want.Bits))
		if err := Dequantise(got, typ, src); err != nil {
			t.Fatal(err)
		}
		for i, bits := range want.Bits {
			w := math.Float32frombits(bits)
			// The order of multiplications differs, and so may the last bit.
			if diff := math.Abs(float64(got[i] - w)); diff > 3e-7*math.Abs(float64(w))+1e-6 {
				t.Errorf("%s: number %d is %v, want %v", name, i, got[i], w)
				break
			}
		}
	}
}

func TestHalvesAreRoundedToTheNearest(t *testing.T) {
	for h := range 1 << 16 {
		f := FromF16(uint16(h))
		if f != f {
			if back := FromF16(ToF16(f)); back == back {
				t.Fatalf("%#x is no number, but %v came back", h, back)
			}
			continue
		}
		if back := ToF16(f); back != uint16(h) {
			t.Fatalf("%#x is %v and comes back as %#x", h, f, back)
		}
		// Half way to the next: to the even one.
		next := FromF16(uint16(h) + 1)
		if h&0x7fff < 0x7bff {
			if got, want := ToF16((f+next)/2), uint16(h+h&1); got != want {
				t.Fatalf("half way from %#x is %#x, want %#x", h, got, want)
			}
		}
	}
	for _, c := range []struct {
		f    float32
		want uint16
	}{{65519, 0x7bff}, {65520, 0x7c00}, {-1e9, 0xfc00}, {1e-9, 0}, {float32(math.Inf(1)), 0x7c00}} {
		if got := ToF16(c.f); got != c.want {
			t.Errorf("%v became %#x, want %#x", c.f, got, c.want)
		}
	}
	if got := ToBF16(1 + 1.0/256); got != 0x3f80 {
		t.Errorf("half way above 1 became %#x, want 1, which is even", got)
	}
}

func TestSizesThatDoNotFitAreRefused(t *testing.T) {
	for name, err := range map[string]error{
		"unknown type":   Dequantise(make([]float32, 32), Type(99), make([]byte, 32)),
		"part of blocks": Dequantise(make([]float32, 33), Q4_0, make([]byte, 18)),
		"too few bytes":  Dequantise(make([]float32, 32), Q4_0, make([]byte, 17)),
		"read only":      Quantise(make([]byte, 84), Q2_K, make([]float32, 256)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, s := range []Shape{{Q4_0, 16, 33}, {Q4_K, 16, 32}, {F32, 0, 4}, {F32, 4, -4}, {Type(99), 1, 1}, {F32, math.MaxInt / 8, 1 << 20}, {BF16, 1, 3}} {
		if n, err := s.Bytes(); err == nil {
			t.Errorf("%+v: has %d bytes", s, n)
		}
	}
	if _, err := NewMatrix(Shape{F32, 16, 4}, make([]byte, 255)); err == nil {
		t.Error("a matrix in too few bytes was made")
	}
	m, err := NewMatrix(Shape{F32, 20, 4}, make([]byte, 512))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ first, bytes int }{{8, 16}, {16, 16 * 5}, {-16, 16}, {0, 15}} {
		if m.PackRows(c.first, make([]byte, c.bytes)) == nil {
			t.Errorf("%d bytes from row %d on were packed", c.bytes, c.first)
		}
	}
}

// Whatever a file says, reading it ends with numbers or an error.
func FuzzDequantise(f *testing.F) {
	for _, t := range types() {
		f.Add(uint32(t), make([]byte, t.BlockBytes()*2))
	}
	f.Fuzz(func(t *testing.T, typ uint32, src []byte) {
		kind := Type(typ)
		if !kind.Known() {
			if Dequantise(nil, kind, src) == nil {
				t.Fatal("a type that is not known was read")
			}
			return
		}
		blocks := len(src) / kind.BlockBytes()
		dst := make([]float32, blocks*kind.BlockLen())
		err := Dequantise(dst, kind, src)
		if exact := len(src)%kind.BlockBytes() == 0; exact != (err == nil) {
			t.Fatalf("%d bytes of %v: %v", len(src), kind, err)
		}
		cols := len(dst)
		s := Shape{kind, 1, cols}
		n, shapeErr := s.Bytes()
		if err != nil || shapeErr != nil {
			return
		}
		m, err := Pack(s, make([]byte, n), src)
		if err != nil {
			t.Fatal(err)
		}
		row := make([]float32, cols)
		m.Row(row, 0)
		for i := range row {
			if row[i] != dst[i] && row[i] == row[i] {
				t.Fatalf("%v: number %d is %v packed and %v in the file", kind, i, row[i], dst[i])
			}
		}
	})
}
