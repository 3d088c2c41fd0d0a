package tensor

import (
	"encoding/binary"
	"math"
)

// fromE4M3 is what each byte is.
var fromE4M3 = func() (t [256]float32) {
	for i := range t {
		t[i] = valueE4M3(byte(i))
	}
	return t
}()

// FromE4M3 returns what an 8-bit number of 4 bits of exponent and 3 of mantissa is:
// up to 448, without infinity, 0x7F and 0xFF not a number.
func FromE4M3(b byte) float32 { return fromE4M3[b] }

func valueE4M3(b byte) float32 {
	exponent, mantissa := int(b>>3&15), float64(b&7)
	var v float64
	switch {
	case b&0x7F == 0x7F:
		v = math.NaN()
	case exponent == 0:
		v = math.Ldexp(mantissa, -9)
	default:
		v = math.Ldexp(8+mantissa, exponent-10)
	}
	return float32(math.Copysign(v, 1-2*float64(b>>7)))
}

// FromE5M2 returns what an 8-bit number of 5 bits of exponent and 2 of mantissa is:
// the upper half of a 16-bit float.
func FromE5M2(b byte) float32 { return FromF16(uint16(b) << 8) }

// ToE4M3 rounds to the nearest, to even in the middle; what is too large becomes
// 448.
func ToE4M3(f float32) byte {
	return nearest8(f, 0x7E, FromE4M3)
}

// ToE5M2 rounds as ToE4M3; what is too large becomes 57344.
func ToE5M2(f float32) byte { return nearest8(f, 0x7B, FromE5M2) }

// nearest8 finds the byte, up to the largest, whose value is nearest; values grow with
// bytes.
func nearest8(f float32, largest byte, value func(byte) float32) byte {
	sign := byte(0)
	if math.Signbit(float64(f)) {
		sign, f = 0x80, -f
	}
	if f != f {
		return sign | 0x7F
	}
	low, high := byte(0), largest // value(low) <= f; f < value(high) or high is the largest
	if f >= value(largest) {
		return sign | largest
	}
	for high-low > 1 {
		if mid := (low + high) / 2; value(mid) <= f {
			low = mid
		} else {
			high = mid
		}
	}
	down, up := f-value(low), value(high)-f
	if up < down || up == down && high&1 == 0 {
		return sign | high
	}
	return sign | low
}

// A block of 8-bit floats is a scale in 32 bits and then the numbers. No pattern of bits that is not a number is written; one
// that is read stays none.

func decodeEight(value func(byte) float32) func(dst []float32, b []byte) {
	return func(dst []float32, b []byte) {
		d := math.Float32frombits(binary.LittleEndian.Uint32(b))
		for i, v := range b[4:] {
			dst[i] = d * value(v)
		}
	}
}

// encodeEight chooses a power of two as scale, such that the largest number is just below the largest that there is.
func encodeEight(largest float64, round func(float32) byte) func(b []byte, x []float32) {
	return func(b []byte, x []float32) {
		d := float32(1)
		if top := math.Abs(float64(extreme(x))); top > 0 {
			d = float32(math.Exp2(max(-100, math.Ceil(math.Log2(top/largest)))))
		}
		binary.LittleEndian.PutUint32(b, math.Float32bits(d))
		for i, v := range x {
			b[4+i] = round(v / d)
		}
	}
}
