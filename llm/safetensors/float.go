package safetensors

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// Floats returns numbers that are stored as floating point, in float32. It fails for
// other types.
func Floats(t DType, raw []byte) ([]float32, error) {
	size := sizes[t]
	if size == 0 || int64(len(raw))%size != 0 {
		return nil, fmt.Errorf("%d bytes of %s", len(raw), t)
	}
	out := make([]float32, int64(len(raw))/size)
	switch t {
	case "F32":
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		}
	case "F16":
		for i := range out {
			out[i] = tensor.FromF16(binary.LittleEndian.Uint16(raw[2*i:]))
		}
	case "BF16":
		for i := range out {
			out[i] = tensor.FromBF16(binary.LittleEndian.Uint16(raw[2*i:]))
		}
	case "F64":
		for i := range out {
			out[i] = float32(math.Float64frombits(binary.LittleEndian.Uint64(raw[8*i:])))
		}
	case "F8_E4M3":
		for i, b := range raw {
			out[i] = fromE4M3[b]
		}
	case "F8_E5M2":
		for i, b := range raw {
			out[i] = FromE5M2(b)
		}
	default:
		return nil, fmt.Errorf("%s is not floating point", t)
	}
	return out, nil
}

// fromE4M3 is FromE4M3 of every byte.
var fromE4M3 = func() (t [256]float32) {
	for i := range t {
		t[i] = FromE4M3(byte(i))
	}
	return t
}()

// FromE4M3 returns what an 8-bit number of 4 bits of exponent and 3 of mantissa is:
// up to 448, without infinity, 0x7F and 0xFF not a number.
func FromE4M3(b byte) float32 {
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
func FromE5M2(b byte) float32 { return tensor.FromF16(uint16(b) << 8) }

// ToE4M3 rounds to the nearest, to even in the middle; what is too large becomes
// 448.
func ToE4M3(f float32) byte {
	return nearest8(f, 0x7E, func(b byte) float32 { return fromE4M3[b] })
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
