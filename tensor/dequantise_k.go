package tensor

import "encoding/binary"

// The K types have blocks of 256 numbers in sub-blocks of 16 or 32, each with a small integer scale (and minimum) of its own.
// Their bits lie in planes: for the first half of a block, then for the second.

// decodeQ2K reads 16 bytes of scales (low nibble) and minima (high nibble), 64 bytes of 2-bit numbers, d, dmin.
func decodeQ2K(dst []float32, b []byte) {
	scales, q := b[:16], b[16:80]
	d, dmin := getHalf(b[80:]), getHalf(b[82:])
	for i := range dst {
		s := scales[i/16]
		v := q[i/128*32+i%32] >> (i % 128 / 32 * 2) & 3
		dst[i] = d*float32(s&15)*float32(v) - dmin*float32(s>>4)
	}
}

// decodeQ3K reads 32 bytes of high bits (clear means minus 4), 64 bytes of low 2 bits, 12 bytes of 6-bit scales, d.
func decodeQ3K(dst []float32, b []byte) {
	high, q, packed, d := b[:32], b[32:96], b[96:108], getHalf(b[108:])
	for i := range dst {
		k := i / 16
		s := packed[k%8] >> (k / 8 * 4) & 15
		s |= packed[8+k%4] >> (k / 4 * 2) & 3 << 4
		v := int(q[i/128*32+i%32] >> (i % 128 / 32 * 2) & 3)
		if high[i%32]>>(i/32)&1 == 0 {
			v -= 4
		}
		dst[i] = d * float32(int(s)-32) * float32(v)
	}
}

// scaleMin reads the k-th of eight 6-bit scales and minima out of 12 bytes.
func scaleMin(b []byte, k int) (scale, minimum byte) {
	if k < 4 {
		return b[k] & 63, b[k+4] & 63
	}
	return b[k+4]&15 | b[k-4]>>6<<4, b[k+4]>>4 | b[k]>>6<<4
}

// decodeQ4K reads d, dmin, 12 bytes of scales and minima, 128 bytes of 4-bit numbers.
func decodeQ4K(dst []float32, b []byte) {
	d, dmin, scales, q := getHalf(b), getHalf(b[2:]), b[4:16], b[16:144]
	for k := range 8 {
		s, m := scaleMin(scales, k)
		scale, low := d*float32(s), dmin*float32(m)
		for i := range 32 {
			dst[k*32+i] = scale*float32(q[k/2*32+i]>>(k%2*4)&15) - low
		}
	}
}

// decodeQ5K reads d, dmin, 12 bytes of scales and minima, 32 bytes of high bits, 128 bytes of low 4 bits.
func decodeQ5K(dst []float32, b []byte) {
	d, dmin, scales, high, q := getHalf(b), getHalf(b[2:]), b[4:16], b[16:48], b[48:176]
	for k := range 8 {
		s, m := scaleMin(scales, k)
		scale, low := d*float32(s), dmin*float32(m)
		for i := range 32 {
			v := q[k/2*32+i]>>(k%2*4)&15 | high[i]>>k&1<<4
			dst[k*32+i] = scale*float32(v) - low
		}
	}
}

// decodeQ6K reads 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 signed scales, d.
func decodeQ6K(dst []float32, b []byte) {
	low, high, scales, d := b[:128], b[128:192], b[192:208], getHalf(b[208:])
	for i := range dst {
		half, quarter := i/128, i%128/32
		v := low[half*64+quarter%2*32+i%32] >> (quarter / 2 * 4) & 15
		v |= high[half*32+i%32] >> (quarter * 2) & 3 << 4
		dst[i] = d * float32(int8(scales[i/16])) * float32(int(v)-32)
	}
}

// decodeIQ4XS reads d, eight 6-bit scales (high 2 bits in 2 bytes, low 4 in 4), 128 bytes of 4-bit indices.
func decodeIQ4XS(dst []float32, b []byte) {
	d, high, low, q := getHalf(b), binary.LittleEndian.Uint16(b[2:]), b[4:8], b[8:136]
	for k := range 8 {
		s := low[k/2]>>(k%2*4)&15 | byte(high>>(2*k)&3)<<4
		scale := d * float32(int(s)-32)
		for i, v := range q[k*16 : k*16+16] {
			dst[k*32+i], dst[k*32+i+16] = scale*float32(nonlinear[v&15]), scale*float32(nonlinear[v>>4])
		}
	}
}
