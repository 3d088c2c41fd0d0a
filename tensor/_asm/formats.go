package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// A format describes how blocks of a type are taken apart, unit by unit: 32 columns that products take together.
type format struct {
	name  string
	bytes int // of one row's block
	units int // in a block
	top   int // the largest unsigned byte that quad gives
	parts int // scales in a unit
	// biased is by how much quad's bytes are too large, which the sums that callers hand over make good.
	biased byte

	// quad gives the bytes of columns 4j to 4j+3 of each row, unsigned, in a register of its own.
	quad func(c *context, unit, j int) VecVirtual
	// scale gives a part's scale, as float.
	scale func(c *context, unit, part int) VecVirtual
	// offset gives what each number of a part has added, as float; nil if nothing. below: subtracted.
	offset func(c *context, unit, part int) VecVirtual
	below  bool
}

// A context is where a block is being taken apart.
type context struct {
	vectors
	w    Register // the block
	half int
}

func (c *context) piece(offset int) Mem { return at(c.w, offset, 4, c.half) }

func (c *context) halfAt(offset int) VecVirtual { return c.vectors.half(at(c.w, offset, 2, c.half)) }

// nibble gives the low (0) or high (1) four bits of every byte of a piece.
func (c *context) nibble(offset, high int) VecVirtual {
	r := c.load(c.piece(offset))
	return c.and(bytes(15), c.shift(4*high, r))
}

// level looks up the nibbles of a piece among the IQ4 levels.
func (c *context) level(offset, high int) VecVirtual {
	n := c.nibble(offset, high)
	r := c.load(levels())
	VPSHUFB(n, r, r)
	return r
}

// bit gives bit n of every byte of a piece, at bit to.
func (c *context) bit(offset, n, to int) VecVirtual {
	r := c.load(c.piece(offset))
	return c.and(bytes(1<<to), c.shift(n-to, r))
}

// two gives bits n and n+1 of every byte of a piece, at bit to.
func (c *context) two(offset, n, to int) VecVirtual {
	r := c.load(c.piece(offset))
	return c.and(bytes(3<<to), c.shift(n-to, r))
}

// byteAt gives byte k of the bytes from offset on, of each row, anded with mask after a shift to the right.
func (c *context) byteAt(offset, k, shift int, mask uint32) VecVirtual {
	r := c.load(c.piece(offset + k/4*4))
	return c.and(dwords(mask), c.shift(k%4*8+shift, r))
}

// spread gives four bits of a piece, from bit 4j on, as bit 4 of each byte.
func (c *context) spread(offset, j int) VecVirtual {
	r := c.load(c.piece(offset))
	k := uint32(j / 2)
	pick := k * 0x01010101
	VPSHUFB(all("pick"+string(rune('0'+k)), pick, pick+0x04040404, pick+0x08080808, pick+0x0c0c0c0c), r, r)
	// Each byte keeps its bit, and comes to be 16 by a shift or a multiplication, which bytes do not have; comparing does it.
	mask := all([]string{"bits0", "bits1"}[j%2], uint32(0x08040201)<<(4*(j%2)))
	c.and(mask, r)
	if !c.wide {
		VPCMPEQB(mask, r, r)
		return c.and(bytes(16), r)
	}
	k1 := K()
	VPTESTMB(r, r, k1)
	out := c.new()
	VMOVDQU8_Z(bytes(16), k1, out)
	return out
}

// kScale gives the k-th 6-bit scale (or minimum) of the 12 bytes at offset.
func kScale(c *context, offset, k int, minimum bool) VecVirtual {
	shift, high := 0, k-4
	if minimum {
		shift, high = 4, k
	}
	if k < 4 {
		if minimum {
			k += 4
		}
		return c.byteAt(offset, k, 0, 63)
	}
	r := c.byteAt(offset, k+4, shift, 15)
	top := c.load(c.piece(offset + high/4*4))
	top = c.and(dwords(0x30), c.shift(high%4*8+2, top))
	return c.or(top, r)
}

func (c *context) mul(a Op, r VecVirtual) VecVirtual {
	VMULPS(a, r, r)
	return r
}

func plain(offset int) func(*context, int, int) VecVirtual {
	return func(c *context, _, _ int) VecVirtual { return c.halfAt(offset) }
}

// kScaled and kOffset read d, dmin and 12 bytes of scales and minima.
func kScaled(c *context, unit, _ int) VecVirtual {
	return c.mul(c.halfAt(0), c.float(kScale(c, 4, unit, false)))
}

func kOffset(c *context, unit, _ int) VecVirtual {
	return c.mul(c.halfAt(2), c.float(kScale(c, 4, unit, true)))
}

// nibbles4 is 32 columns in 16 bytes: the first half low.
func nibbles4(offset int) func(*context, int, int) VecVirtual {
	return func(c *context, _, j int) VecVirtual { return c.nibble(offset+j%4*4, j/4) }
}

func threes(offset int) func(*context, int, int) VecVirtual {
	return func(c *context, _, j int) VecVirtual {
		return c.or(c.bit(offset+8, j, 2), c.two(offset+j/4*4, j%4*2, 0))
	}
}

func fives(high, low int) func(*context, int, int) VecVirtual {
	return func(c *context, _, j int) VecVirtual {
		return c.or(c.spread(high, j), c.nibble(low+j%4*4, j/4))
	}
}

var formats = []format{
	{name: "Q4_0", bytes: 18, units: 1, top: 15, parts: 1, biased: 8, quad: nibbles4(2), scale: plain(0)},
	{name: "Q3_0", bytes: 14, units: 1, top: 7, parts: 1, biased: 4, quad: threes(2), scale: plain(0)},
	{name: "Q3_1", bytes: 16, units: 1, top: 7, parts: 1, quad: threes(4), scale: plain(0), offset: plain(2)},
	{name: "Q4_1", bytes: 20, units: 1, top: 15, parts: 1, quad: nibbles4(4), scale: plain(0), offset: plain(2)},
	{name: "Q5_0", bytes: 22, units: 1, top: 31, parts: 1, biased: 16, quad: fives(2, 6), scale: plain(0)},
	{name: "Q5_1", bytes: 24, units: 1, top: 31, parts: 1, quad: fives(4, 8), scale: plain(0), offset: plain(2)},
	{name: "Q8_0", bytes: 34, units: 1, top: 255, parts: 1, biased: 128, scale: plain(0),
		quad: func(c *context, _, j int) VecVirtual { return c.load(c.piece(2 + 4*j)) }},
	{name: "IQ4_NL", bytes: 18, units: 1, top: 255, parts: 1, biased: 128, scale: plain(0),
		quad: func(c *context, _, j int) VecVirtual { return c.level(2+j%4*4, j/4) }},
	{name: "IQ4_XS", bytes: 136, units: 8, top: 255, parts: 1, biased: 128, quad: func(c *context, u, j int) VecVirtual {
		return c.level(8+16*u+j%4*4, j/4)
	}, scale: scaleIQ4XS},
	{name: "Q2_K", bytes: 84, units: 8, top: 3, parts: 2, quad: func(c *context, u, j int) VecVirtual {
		return c.two(16+u/4*32+4*j, u%4*2, 0)
	}, scale: func(c *context, u, p int) VecVirtual {
		return c.mul(c.halfAt(80), c.float(c.byteAt(0, 2*u+p, 0, 15)))
	}, offset: func(c *context, u, p int) VecVirtual {
		return c.mul(c.halfAt(82), c.float(c.byteAt(0, 2*u+p, 4, 15)))
	}, below: true},
	{name: "Q3_K", bytes: 110, units: 8, top: 7, parts: 2, biased: 4, quad: func(c *context, u, j int) VecVirtual {
		return c.or(c.two(32+u/4*32+4*j, u%4*2, 0), c.bit(4*j, u, 2))
	}, scale: scaleQ3K},
	{name: "Q4_K", bytes: 144, units: 8, top: 15, parts: 1, quad: func(c *context, u, j int) VecVirtual {
		return c.nibble(16+u/2*32+4*j, u%2)
	}, scale: kScaled, offset: kOffset, below: true},
	{name: "Q5_K", bytes: 176, units: 8, top: 31, parts: 1, quad: func(c *context, u, j int) VecVirtual {
		return c.or(c.bit(16+4*j, u, 4), c.nibble(48+u/2*32+4*j, u%2))
	}, scale: kScaled, offset: kOffset, below: true},
	{name: "Q6_K", bytes: 210, units: 8, top: 63, parts: 2, biased: 32, quad: func(c *context, u, j int) VecVirtual {
		return c.or(c.two(128+u/4*32+4*j, u%4*2, 4), c.nibble(u/4*64+u%2*32+4*j, u%4/2))
	}, scale: func(c *context, u, p int) VecVirtual {
		k := 2*u + p
		r := c.load(c.piece(192 + k/4*4))
		c.shift(k%4*8-24, r)
		VPSRAD(Imm(24), r, r)
		return c.mul(c.halfAt(208), c.float(r))
	}},
}

func scaleIQ4XS(c *context, u, _ int) VecVirtual {
	high := c.words(at(c.w, 2, 2, c.half))
	c.and(dwords(0x30), c.shift(2*u-4, high))
	r := c.or(high, c.byteAt(4, u/2, u%2*4, 15))
	return c.mul(c.halfAt(0), c.float(less32(c, r)))
}

func scaleQ3K(c *context, u, p int) VecVirtual {
	k := 2*u + p
	r := c.byteAt(96, k%8, k/8*4, 15)
	// The high two bits are bits k/4*2 of byte 8+k%4; they go to bit 4.
	high := c.load(c.piece(104))
	c.and(dwords(0x30), c.shift(k%4*8+k/4*2-4, high))
	return c.mul(c.halfAt(108), c.float(less32(c, c.or(high, r))))
}

// less32 makes a 6-bit number signed.
func less32(c *context, r VecVirtual) VecVirtual {
	VPSUBD(dwords(32), r, r)
	return r
}
