package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Dequantise writes the numbers that src holds in GGUF's layout. It fails if the type is not known, or if src does not hold
// exactly len(dst) numbers in whole blocks.
func Dequantise(dst []float32, t Type, src []byte) error {
	if err := fits(t, len(dst), len(src)); err != nil {
		return err
	}
	n, size := t.BlockLen(), t.BlockBytes()
	decode := decoders[t]
	for ; len(dst) > 0; dst, src = dst[n:], src[size:] {
		decode(dst[:n], src[:size])
	}
	return nil
}

func fits(t Type, numbers, bytes int) error {
	if !t.Known() {
		return fmt.Errorf("%v is not known", t)
	}
	if numbers%t.BlockLen() != 0 {
		return fmt.Errorf("%d numbers are not whole blocks of %v, which have %d", numbers, t, t.BlockLen())
	}
	if want := t.Bytes(numbers); bytes != want {
		return fmt.Errorf("%d numbers of %v take %d bytes, not %d", numbers, t, want, bytes)
	}
	return nil
}

// decoders write one block.
var decoders = map[Type]func(dst []float32, b []byte){
	F32: func(dst []float32, b []byte) { dst[0] = math.Float32frombits(binary.LittleEndian.Uint32(b)) },
	F16: func(dst []float32, b []byte) { dst[0] = getHalf(b) },
	BF16: func(dst []float32, b []byte) {
		dst[0] = FromBF16(binary.LittleEndian.Uint16(b))
	},
	Q4_0: func(dst []float32, b []byte) {
		d := getHalf(b)
		for i, v := range b[2:18] {
			dst[i], dst[i+16] = d*float32(int(v&15)-8), d*float32(int(v>>4)-8)
		}
	},
	Q4_1: func(dst []float32, b []byte) {
		d, m := getHalf(b), getHalf(b[2:])
		for i, v := range b[4:20] {
			dst[i], dst[i+16] = d*float32(v&15)+m, d*float32(v>>4)+m
		}
	},
	Q5_0: func(dst []float32, b []byte) {
		d, high := getHalf(b), binary.LittleEndian.Uint32(b[2:])
		for i, v := range b[6:22] {
			dst[i] = d * float32(int(uint32(v&15)|high>>i&1<<4)-16)
			dst[i+16] = d * float32(int(uint32(v>>4)|high>>(i+16)&1<<4)-16)
		}
	},
	Q5_1: func(dst []float32, b []byte) {
		d, m, high := getHalf(b), getHalf(b[2:]), binary.LittleEndian.Uint32(b[4:])
		for i, v := range b[8:24] {
			dst[i] = d*float32(uint32(v&15)|high>>i&1<<4) + m
			dst[i+16] = d*float32(uint32(v>>4)|high>>(i+16)&1<<4) + m
		}
	},
	Q8_0: func(dst []float32, b []byte) {
		d := getHalf(b)
		for i, v := range b[2:34] {
			dst[i] = d * float32(int8(v))
		}
	},
	IQ4_NL: func(dst []float32, b []byte) {
		d := getHalf(b)
		for i, v := range b[2:18] {
			dst[i], dst[i+16] = d*float32(nonlinear[v&15]), d*float32(nonlinear[v>>4])
		}
	},
	Q3_0: func(dst []float32, b []byte) {
		d := getHalf(b)
		for i := range dst {
			dst[i] = d * float32(int(three(b[2:], i))-4)
		}
	},
	Q3_1: func(dst []float32, b []byte) {
		d, m := getHalf(b), getHalf(b[2:])
		for i := range dst {
			dst[i] = d*float32(three(b[4:], i)) + m
		}
	},
	F8_E4M3: decodeEight(FromE4M3),
	F8_E5M2: decodeEight(FromE5M2),
	Q2_K:    decodeQ2K, Q3_K: decodeQ3K, Q4_K: decodeQ4K, Q5_K: decodeQ5K, Q6_K: decodeQ6K, IQ4_XS: decodeIQ4XS,
}

// three returns number i of 32 of 3 bits: the low two in 8 bytes, of which each has numbers 4 apart, then the high ones in 4.
func three(b []byte, i int) byte {
	return b[i/16*4+i%4]>>(i%16/4*2)&3 | b[8+i%4]>>(i/4)&1<<2
}

// nonlinear are the sixteen levels of the IQ4 types.
var nonlinear = [16]int8{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}
