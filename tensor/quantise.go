package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Quantise writes src in GGUF's layout, each number rounded to the nearest that its block can hold, with the block's scales
// chosen for the least error. It fails if dst has not exactly the size of len(src) numbers, or for types that are only read:
// Q2_K, Q3_K, Q5_K and the IQ types.
func Quantise(dst []byte, t Type, src []float32) error {
	if err := fits(t, len(src), len(dst)); err != nil {
		return err
	}
	encode := encoders[t]
	if encode == nil {
		return fmt.Errorf("%v can be read only", t)
	}
	n, size := t.BlockLen(), t.BlockBytes()
	for ; len(src) > 0; dst, src = dst[size:], src[n:] {
		encode(dst[:size], src[:n])
	}
	return nil
}

// encoders write one block.
var encoders = map[Type]func(b []byte, x []float32){
	F32:     func(b []byte, x []float32) { binary.LittleEndian.PutUint32(b, math.Float32bits(x[0])) },
	F16:     func(b []byte, x []float32) { putHalf(b, x[0]) },
	BF16:    func(b []byte, x []float32) { binary.LittleEndian.PutUint16(b, ToBF16(x[0])) },
	F8_E4M3: encodeEight(448, ToE4M3),
	F8_E5M2: encodeEight(57344, ToE5M2),
	Q3_0: func(b []byte, x []float32) {
		d := extreme(x) / -4
		putHalf(b, d)
		inv := inverse(d)
		PutThrees(b[2:], func(i int) byte { return level(x[i]*inv+4, 7) })
	},
	Q3_1: func(b []byte, x []float32) {
		low, high := bounds(x)
		d := (high - low) / 7
		putHalf(b, d)
		putHalf(b[2:], low)
		inv := inverse(d)
		PutThrees(b[4:], func(i int) byte { return level((x[i]-low)*inv, 7) })
	},
	Q4_0: func(b []byte, x []float32) {
		d := extreme(x) / -8
		putHalf(b, d)
		inv := inverse(d)
		for i := range 16 {
			b[2+i] = level(x[i]*inv+8, 15) | level(x[i+16]*inv+8, 15)<<4
		}
	},
	Q4_1: func(b []byte, x []float32) {
		low, high := bounds(x)
		d := (high - low) / 15
		putHalf(b, d)
		putHalf(b[2:], low)
		inv := inverse(d)
		for i := range 16 {
			b[4+i] = level((x[i]-low)*inv, 15) | level((x[i+16]-low)*inv, 15)<<4
		}
	},
	Q5_0: func(b []byte, x []float32) {
		d := extreme(x) / -16
		putHalf(b, d)
		inv := inverse(d)
		five(b[2:], func(i int) byte { return level(x[i]*inv+16, 31) })
	},
	Q5_1: func(b []byte, x []float32) {
		low, high := bounds(x)
		d := (high - low) / 31
		putHalf(b, d)
		putHalf(b[2:], low)
		inv := inverse(d)
		five(b[4:], func(i int) byte { return level((x[i]-low)*inv, 31) })
	},
	Q8_0: func(b []byte, x []float32) {
		low, high := bounds(x)
		d := max(high, -low) / 127
		putHalf(b, d)
		inv := inverse(d)
		for i, v := range x {
			b[2+i] = byte(int8(math.RoundToEven(float64(v * inv))))
		}
	},
	Q4_K: encodeQ4K,
	Q6_K: encodeQ6K,
}

// PutThrees writes 32 numbers of 3 bits into 12 bytes, as the blocks of Q3_0 and Q3_1 have them after their scales.
func PutThrees(b []byte, q func(i int) byte) {
	clear(b[:12])
	for i := range 32 {
		v := q(i)
		b[i/16*4+i%4] |= v & 3 << (i % 16 / 4 * 2)
		b[8+i%4] |= v >> 2 & 1 << (i / 4)
	}
}

// five writes 32 numbers of 5 bits: the high bits in 4 bytes, then the low nibbles.
func five(b []byte, q func(i int) byte) {
	var high uint32
	for i := range 16 {
		lo, hi := q(i), q(i+16)
		b[4+i] = lo&15 | hi<<4
		high |= uint32(lo>>4)<<i | uint32(hi>>4)<<(i+16)
	}
	binary.LittleEndian.PutUint32(b, high)
}

// extreme returns the number with the largest absolute value, with its sign.
func extreme(x []float32) float32 {
	var e, abs float32
	for _, v := range x {
		if a := float32(math.Abs(float64(v))); a > abs {
			e, abs = v, a
		}
	}
	return e
}

func bounds(x []float32) (low, high float32) {
	low, high = x[0], x[0]
	for _, v := range x {
		low, high = min(low, v), max(high, v)
	}
	return low, high
}

func inverse(d float32) float32 {
	if d == 0 {
		return 0
	}
	return 1 / d
}

// level rounds v, held to 0..top.
func level(v float32, top int) byte {
	if !(v > 0) { // also not a number
		return 0
	}
	return byte(min(int(v+0.5), top))
}
