package squeeze

import (
	"encoding/binary"
	"math"
	"slices"

	"github.com/atoll-run/atoll/tensor"
)

// appendValues writes values by a form, their scales first.
func appendValues(dst []byte, x []float32, f Form) []byte {
	dst = slices.Grow(dst, forms[f].bytes(len(x)))
	switch f {
	case F32:
		for _, v := range x {
			dst = binary.LittleEndian.AppendUint32(dst, math.Float32bits(v))
		}
		return dst
	case BF16:
		for _, v := range x {
			dst = binary.LittleEndian.AppendUint16(dst, nearBF16(v))
		}
		return dst
	}
	size := len(dst)
	dst = append(dst, make([]byte, forms[f].bytes(len(x)))...)
	quantise(dst[size:], x, forms[f])
	return dst
}

// nearBF16 rounds to the nearest finite bfloat16.
func nearBF16(v float32) uint16 {
	h := tensor.ToBF16(v)
	if !finite(tensor.FromBF16(h)) {
		h-- // the largest one of this sign
	}
	return h
}

// quantise writes whole numbers of 8 or 4 bits. The arithmetic is that of float64, so that products with scales are exact.
func quantise(out []byte, x []float32, f form) {
	n := f.scales(len(x))
	scales, values := out[:2*n], out[2*n:]
	for b := range n {
		block := x[b*f.block : min((b+1)*f.block, len(x))]
		scale, h := scaleOf(block, f.top)
		binary.LittleEndian.PutUint16(scales[2*b:], h)
		if scale == 0 {
			continue
		}
		inverse := 1 / scale
		for i, v := range block {
			q := int8(math.RoundToEven(float64(v) * inverse))
			if at := b*f.block + i; f.bits == 8 {
				values[at] = byte(q)
			} else {
				values[at/2] |= byte(q) & 15 << (at % 2 * 4)
			}
		}
	}
}

// scaleOf returns the least scale, and its bfloat16, by which no value of a block exceeds top.
func scaleOf(block []float32, top float64) (float64, uint16) {
	var most float32
	for _, v := range block {
		most = max(most, float32(math.Abs(float64(v))))
	}
	want := float64(most) / top
	h := tensor.ToBF16(float32(want))
	for float64(tensor.FromBF16(h)) < want {
		h++ // the next larger one: magnitudes are in order
	}
	return float64(tensor.FromBF16(h)), h
}

// values sets x to all values in b, written by a form. It refuses what no encoder writes.
func values(x []float32, b []byte, form Form) error {
	f := forms[form]
	if len(b) != f.bytes(len(x)) {
		return ErrCorrupt
	}
	good := true
	switch form {
	case F32:
		for i := range x {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
			good = good && finite(x[i])
		}
	case BF16:
		for i := range x {
			x[i] = tensor.FromBF16(binary.LittleEndian.Uint16(b[2*i:]))
			good = good && finite(x[i])
		}
	default:
		n := f.scales(len(x))
		scales, numbers := b[:2*n], b[2*n:]
		for i := range n {
			scale := tensor.FromBF16(binary.LittleEndian.Uint16(scales[2*i:]))
			good = good && finite(scale) && !math.Signbit(float64(scale))
			from, to := i*f.block, min((i+1)*f.block, len(x))
			good = f.multiply(x[from:to], numbers[from*f.bits/8:(to*f.bits+7)/8], float64(scale)) && good
		}
	}
	if !good {
		return ErrCorrupt
	}
	return nil
}

// multiply sets a block to whole numbers times their scale; it reports whether an encoder may have written them.
func (f form) multiply(block []float32, b []byte, scale float64) bool {
	good := true
	if f.bits == 8 {
		for i, c := range b {
			good = good && c != 0x80
			block[i] = float32(float64(int8(c)) * scale)
		}
	} else {
		for i := range block {
			c := b[i/2] >> (i % 2 * 4) << 4
			good = good && c != 0x80
			block[i] = float32(float64(int8(c)>>4) * scale)
		}
		good = good && (len(block)%2 == 0 || b[len(b)-1]>>4 == 0)
	}
	// The scale was rounded up, so that the largest of all floats may come out a little larger than it is.
	if f.top*scale > math.MaxFloat32 {
		for i, v := range block {
			block[i] = min(max(v, -math.MaxFloat32), math.MaxFloat32)
		}
	}
	return good
}
