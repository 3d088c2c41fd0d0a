package squeeze

import (
	"encoding/binary"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// appendValues writes values by a form, their scales first.
func appendValues(dst []byte, x []float32, f Form) []byte {
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

// values reads n values by a form into dst[at(i)].
func values(dst []float32, b []byte, f Form, n int, at func(int) int) error {
	d := forms[f]
	if len(b) != d.bytes(n) {
		return ErrCorrupt
	}
	scales, b := b[:2*d.scales(n)], b[2*d.scales(n):]
	for start := 0; start < n; {
		end, scale := n, 0.0
		if d.block > 0 {
			s := tensor.FromBF16(binary.LittleEndian.Uint16(scales[start/d.block*2:]))
			if !finite(s) || math.Signbit(float64(s)) {
				return ErrCorrupt
			}
			end, scale = min(start+d.block, n), float64(s)
		}
		for i := start; i < end; i++ {
			v, ok := value(b, f, i, scale)
			if !ok {
				return ErrCorrupt
			}
			dst[at(i)] = v
		}
		start = end
	}
	if f == Int4 && n%2 == 1 && b[n/2]>>4 != 0 {
		return ErrCorrupt
	}
	return nil
}

// value reads one value; ok is false for one that no encoder writes.
func value(b []byte, f Form, i int, scale float64) (v float32, ok bool) {
	var q int8
	switch f {
	case F32:
		v = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		return v, finite(v)
	case BF16:
		v = tensor.FromBF16(binary.LittleEndian.Uint16(b[2*i:]))
		return v, finite(v)
	case Int8:
		q = int8(b[i])
		ok = q != -128
	case Int4:
		q = int8(b[i/2]>>(i%2*4)<<4) >> 4
		ok = q != -8
	}
	// The scale was rounded up, so that the largest of all floats may come out a little larger than it is.
	return float32(min(max(float64(q)*scale, -math.MaxFloat32), math.MaxFloat32)), ok
}
