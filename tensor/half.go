package tensor

import (
	"encoding/binary"
	"math"
)

// FromF16 widens an IEEE half. It is exact.
func FromF16(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exp, frac := uint32(h>>10&31), uint32(h&0x3ff)
	switch exp {
	case 0: // zero and denormals: frac units of 2^-24
		return math.Float32frombits(sign | math.Float32bits(float32(frac)*0x1p-24))
	case 31:
		return math.Float32frombits(sign | 0x7f800000 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

// ToF16 rounds to the nearest IEEE half, ties to even; what is too large becomes an infinity.
func ToF16(f float32) uint16 {
	b := math.Float32bits(f)
	sign, a := uint16(b>>16)&0x8000, b&0x7fffffff
	switch {
	case a > 0x7f800000: // NaN: stays one
		return sign | 0x7e00
	case a >= 0x477ff000: // from 65520 on
		return sign | 0x7c00
	case a < 0x38800000: // below 2^-14: denormal; adding 0.5 lets the addition round
		d := math.Float32bits(math.Float32frombits(a)+0.5) - 0x3f000000
		return sign | uint16(d)
	}
	a += 0xfff + a>>13&1
	return sign | uint16((a-0x38000000)>>13)
}

// FromBF16 widens a bfloat16. It is exact.
func FromBF16(h uint16) float32 { return math.Float32frombits(uint32(h) << 16) }

// ToBF16 rounds to the nearest bfloat16, ties to even.
func ToBF16(f float32) uint16 {
	b := math.Float32bits(f)
	if b&0x7fffffff > 0x7f800000 {
		return uint16(b>>16) | 0x40
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

func getHalf(b []byte) float32 { return FromF16(binary.LittleEndian.Uint16(b)) }

func putHalf(b []byte, f float32) { binary.LittleEndian.PutUint16(b, ToF16(f)) }
