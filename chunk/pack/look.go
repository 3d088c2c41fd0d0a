package pack

import (
	"math"

	"github.com/klauspost/compress/zstd"
)

// A Class is what bytes hold, as far as packing cares.
type Class byte

// The classes.
const (
	Binary Class = iota // anything not below
	Zero                // nothing but zeros
	Text                // for people or parsers
	Packed              // compressed or encrypted already, or random
	BF16                // 16-bit floating-point numbers of one magnitude, such as weights
	F32                 // 32-bit ones
)

// String returns the class's name.
func (c Class) String() string {
	names := [...]string{"binary", "zero", "text", "packed", "bf16", "f32"}
	if int(c) < len(names) {
		return names[c]
	}
	return "unknown"
}

// A Sample is what a look at some bytes says.
type Sample struct {
	Class Class
	Size  int     // of all the bytes
	Ratio float64 // what the fastest compressor leaves of them, from 0 to 1, after splitting into planes
}

const (
	windows    = 8         // looked at, spread evenly, at least,
	windowEach = 128 << 10 // and one for so many bytes
	windowSize = 4 << 10   // bytes; a multiple of the size of a number
)

// Look examines 32 KB of data, or 1/32 of it if that is more, spread evenly. It costs about as much as compressing these.
func Look(data []byte) Sample {
	s := Sample{Size: len(data), Ratio: 1}
	if isZero(data) {
		s.Class, s.Ratio = Zero, 0
		return s
	}
	some := spread(data)
	s.Class = classify(some)
	if s.Class == Packed {
		return s
	}
	s.Ratio = trial(some, s.Class)
	if s.Class.planes() > 0 {
		// Tables of addresses look like numbers too, but repeat.
		if plain := trial(some, Binary); plain < s.Ratio {
			s.Class, s.Ratio = Binary, plain
		}
	}
	if s.Ratio > 0.97 {
		s.Class, s.Ratio = Packed, 1
	}
	return s
}

// Planes reports whether the bytes are numbers, which are split into planes.
func (s Sample) Planes() bool { return s.Class.planes() > 0 }

// Nearer reports whether less is left of data, of which s is a sample, when its difference from a prior version is packed.
// Both are looked at in the same places.
func Nearer(s Sample, data, prior []byte) bool {
	if len(prior) < len(data) {
		return false
	}
	return trial(xored(spread(data), spread(prior[:len(data)])), s.Class) < nearer*s.Ratio
}

// nearer is how much less the difference must leave, at most, to be worth reading the prior version.
const nearer = 0.95

// trial returns what is left of some bytes when they are packed as those of a class.
func trial(some []byte, c Class) float64 {
	packed, err := Append(nil, some, nil, Plan{Planes: c.planes(), Coder: Zstd, Level: zstd.SpeedFastest})
	if err != nil {
		return 1
	}
	return min(1, float64(len(packed))/float64(len(some)))
}

// planes is into how many planes numbers of the class are split.
func (c Class) planes() int {
	switch c {
	case BF16:
		return 2
	case F32:
		return 4
	}
	return 0
}

func spread(data []byte) []byte {
	n := max(windows, len(data)/windowEach)
	if len(data) <= n*windowSize {
		return data
	}
	some := make([]byte, 0, n*windowSize)
	step := (len(data) - windowSize) / (n - 1) &^ 7 // numbers keep their alignment
	for i := range n {
		some = append(some, data[i*step:i*step+windowSize]...)
	}
	return some
}

// classify tells by the distribution of bytes what they hold. The limits are bits per byte: of trained weights, exponents
// have 2 to 5 and mantissas over 7; of text, all bytes together less than 6.5.
func classify(p []byte) Class {
	all := entropy(p, 0, 1)
	if all < 6.5 && textual(p) {
		return Text
	}
	if len(p) < windowSize {
		return Binary
	}
	var plane [4]float64
	for i := range plane {
		plane[i] = entropy(p, i, 4)
	}
	const exponent, mantissa = 5.5, 6.5
	switch {
	case plane[1] < exponent && plane[3] < exponent && plane[0] > mantissa && plane[2] > mantissa:
		return BF16
	case plane[3] < exponent && plane[0] > mantissa && plane[1] > mantissa && plane[2] > mantissa:
		return F32
	case all > 7.95:
		return Packed
	}
	return Binary
}

// textual reports whether nearly all bytes are printable, or parts of UTF-8 beyond ASCII.
func textual(p []byte) bool {
	odd := 0
	for _, b := range p {
		if b < ' ' && b != '\n' && b != '\t' && b != '\r' || b == 0x7f || b >= 0xf8 {
			odd++
		}
	}
	return odd*100 <= len(p)
}

// entropy is that of every step-th byte from begin on, in bits per byte.
func entropy(p []byte, begin, step int) float64 {
	var count [256]int
	n := 0
	for i := begin; i < len(p); i += step {
		count[p[i]]++
		n++
	}
	bits := 0.0
	for _, c := range count {
		if c > 0 {
			f := float64(c) / float64(n)
			bits -= f * math.Log2(f)
		}
	}
	return bits
}
