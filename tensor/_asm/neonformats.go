package main

// How NEON takes blocks apart: as formats says, but 4 rows at a time and into signed bytes, which are what they stand for in the
// types whose bytes are 128 too large elsewhere.

// A neonFormat has the bytes of four rows (quarter 0 to 3 of 16) of unit u: quad j has columns 4j to 4j+3.
type neonFormat struct {
	quad          func(k *neonKernel, u, j int) quad128
	scale, offset func(k *neonKernel, u, part int) quad128
}

// signed tells that quad gives what bytes stand for.
func (f format) signed() bool { return f.top > 127 }

// piece loads 4 bytes of each row from a block's offset on.
func (k *neonKernel) piece(offset int) quad128 { return k.load(16, "R2", offset*16+k.quarter*16) }

// halfAt loads an F16 of each row.
func (k *neonKernel) halfAt(offset int) quad128 {
	r := k.load(8, "R8", offset*16+k.quarter*8)
	k.one(iFCVTL, r, r)
	return r
}

// bits moves bits n and on of each byte to bit to, and keeps those of mask.
func (k *neonKernel) bits(offset, n, to int, mask byte) quad128 {
	r := k.piece(offset)
	switch {
	case n > to:
		k.ushr(8, r, r, n-to)
	case n < to:
		k.shl(8, r, r, to-n)
	}
	if n < to || int(mask) != 255>>(n-to) {
		k.do(iAND, r, r, k.bytes(mask))
	}
	return r
}

func (k *neonKernel) nibble(offset, high int) quad128 { return k.bits(offset, 4*high, 0, 15) }

// or adds b's bits to a's.
func (k *neonKernel) or(a, b quad128) quad128 {
	k.do(iORR, a, a, b)
	k.drop(b)
	return a
}

// field gives width bits from bit on of each lane of 32.
func (k *neonKernel) field(r quad128, bit, width int) quad128 {
	if bit+width < 32 {
		k.shl(32, r, r, 32-bit-width)
	}
	k.ushr(32, r, r, 32-width)
	return r
}

// byteField gives width bits from bit on of byte b of those from offset on.
func (k *neonKernel) byteField(offset, b, bit, width int) quad128 {
	return k.field(k.piece(offset+b/4*4), b%4*8+bit, width)
}

// six is a number of 4 bits with 2 more above.
func (k *neonKernel) six(low, high quad128) quad128 {
	k.sli(low, high, 4)
	k.drop(high)
	return low
}

// times makes an integer a float times the F16 at offset.
func (k *neonKernel) times(r quad128, offset int) quad128 {
	h := k.halfAt(offset)
	k.one(iSCVTF, r, r)
	k.do(iFMUL, r, r, h)
	k.drop(h)
	return r
}

func (k *neonKernel) less32(r quad128) quad128 {
	k.do(iSUB, r, r, k.lanes(32))
	return r
}

func (k *neonKernel) level(offset, high int) quad128 {
	r := k.nibble(offset, high)
	k.tbl(r, k.table("Levels", // signed, of which levels has those with 128 added
		[4]uint32{0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535}), r)
	return r
}

// fifth gives bits 4j to 4j+3 of 32 as bit 4 of a byte each.
func (k *neonKernel) fifth(offset, j int) quad128 {
	r := k.field(k.piece(offset), 4*j, 4)
	k.do(iMUL, r, r, k.lanes(0x00204081<<4)) // bit i comes to be bit 8i+4, among others
	k.do(iAND, r, r, k.bytes(16))
	return r
}

// kScale is as its namesake of amd64.
func (k *neonKernel) kScale(unit int, minimum bool) quad128 {
	const scales = 4
	second, shift := 0, 0
	if minimum {
		second, shift = 4, 4
	}
	if unit < 4 {
		return k.byteField(scales+second, unit, 0, 6)
	}
	return k.six(k.byteField(scales+8, unit-4, shift, 4), k.byteField(scales+second, unit-4, 6, 2))
}

func neonPlain(offset int) func(*neonKernel, int, int) quad128 {
	return func(k *neonKernel, _, _ int) quad128 { return k.halfAt(offset) }
}

func neonNibbles(offset int) func(*neonKernel, int, int) quad128 {
	return func(k *neonKernel, _, j int) quad128 { return k.nibble(offset+j%4*4, j/4) }
}

func neonThrees(offset int) func(*neonKernel, int, int) quad128 {
	return func(k *neonKernel, _, j int) quad128 {
		return k.or(k.bits(offset+8, j, 2, 4), k.bits(offset+j/4*4, j%4*2, 0, 3))
	}
}

func neonFives(high, low int) func(*neonKernel, int, int) quad128 {
	return func(k *neonKernel, _, j int) quad128 {
		return k.or(k.fifth(high, j), k.nibble(low+j%4*4, j/4))
	}
}

func neonKScaled(k *neonKernel, u, _ int) quad128 { return k.times(k.kScale(u, false), 0) }
func neonKOffset(k *neonKernel, u, _ int) quad128 { return k.times(k.kScale(u, true), 2) }

var neonFormats = map[string]neonFormat{
	"Q4_0": {quad: neonNibbles(2), scale: neonPlain(0)},
	"Q3_0": {quad: neonThrees(2), scale: neonPlain(0)},
	"Q3_1": {quad: neonThrees(4), scale: neonPlain(0), offset: neonPlain(2)},
	"Q4_1": {quad: neonNibbles(4), scale: neonPlain(0), offset: neonPlain(2)},
	"Q5_0": {quad: neonFives(2, 6), scale: neonPlain(0)},
	"Q5_1": {quad: neonFives(4, 8), scale: neonPlain(0), offset: neonPlain(2)},
	"Q8_0": {scale: neonPlain(0), quad: func(k *neonKernel, _, j int) quad128 {
		r := k.piece(2 + 4*j)
		k.do(iEOR, r, r, k.bytes(0x80))
		return r
	}},
	"IQ4_NL": {scale: neonPlain(0), quad: func(k *neonKernel, _, j int) quad128 { return k.level(2+j%4*4, j/4) }},
	"IQ4_XS": {quad: func(k *neonKernel, u, j int) quad128 { return k.level(8+16*u+j%4*4, j/4) },
		scale: func(k *neonKernel, u, _ int) quad128 {
			high := k.load(8, "R8", 2*16+k.quarter*8)
			k.one(iUSHLLH, high, high)
			return k.times(k.less32(k.six(k.byteField(4, u/2, u%2*4, 4), k.field(high, 2*u, 2))), 0)
		}},
	"Q2_K": {quad: func(k *neonKernel, u, j int) quad128 { return k.bits(16+u/4*32+4*j, u%4*2, 0, 3) },
		scale:  func(k *neonKernel, u, p int) quad128 { return k.times(k.byteField(0, 2*u+p, 0, 4), 80) },
		offset: func(k *neonKernel, u, p int) quad128 { return k.times(k.byteField(0, 2*u+p, 4, 4), 82) }},
	"Q3_K": {quad: func(k *neonKernel, u, j int) quad128 {
		return k.or(k.bits(32+u/4*32+4*j, u%4*2, 0, 3), k.bits(4*j, u, 2, 4))
	}, scale: func(k *neonKernel, u, p int) quad128 {
		i := 2*u + p
		return k.times(k.less32(k.six(k.byteField(96, i%8, i/8*4, 4), k.byteField(104, i%4, i/4*2, 2))), 108)
	}},
	"Q4_K": {quad: func(k *neonKernel, u, j int) quad128 { return k.nibble(16+u/2*32+4*j, u%2) }, scale: neonKScaled, offset: neonKOffset},
	"Q5_K": {quad: func(k *neonKernel, u, j int) quad128 {
		return k.or(k.bits(16+4*j, u, 4, 16), k.nibble(48+u/2*32+4*j, u%2))
	}, scale: neonKScaled, offset: neonKOffset},
	"Q6_K": {quad: func(k *neonKernel, u, j int) quad128 {
		return k.or(k.bits(128+u/4*32+4*j, u%4*2, 4, 0x30), k.nibble(u/4*64+u%2*32+4*j, u%4/2))
	}, scale: func(k *neonKernel, u, p int) quad128 {
		i := 2*u + p
		r := k.piece(192 + i/4*4)
		k.shl(32, r, r, 24-i%4*8)
		k.sshr(32, r, r, 24)
		return k.times(r, 208)
	}},
}
