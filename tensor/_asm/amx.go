package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Neither avo nor Go's assembler know AMX: its instructions are written as bytes, with the registers below.
var (
	left   = [2]GPPhysical{RSI, RDX} // activations: a row of a tile is a token
	right  = [2]GPPhysical{RDI, RBX} // weights: a row of a tile is 2 columns of 16 rows
	result = RAX                     // memory for results
	lineBy = RCX                     // 64: bytes between rows of tiles
)

var numbers = map[Register]byte{RAX: 0, RCX: 1, RDX: 2, RBX: 3, RSI: 6, RDI: 7}

// raw emits an instruction of VEX map 0F38. prefix: 0 none, 2 F3, 3 F2; third: the tile in the prefix's spare operand.
func raw(prefix, third, opcode byte, rest []byte, reads ...Op) {
	bytes := append([]byte{0xc4, 0xe2, (^third&15)<<3 | prefix, opcode}, rest...)
	for _, b := range bytes {
		Instruction(&ir.Instruction{Opcode: "BYTE", Operands: []Op{U8(b)}, Inputs: reads})
	}
}

// memory is the operand bytes of a tile in memory at base+disp, rows by bytes apart.
func memory(tile byte, base, by Register, disp uint32) []byte {
	return []byte{0x84 | tile<<3, numbers[by]<<3 | numbers[base], byte(disp), byte(disp >> 8), byte(disp >> 16), byte(disp >> 24)}
}

func tileLoad(tile byte, base Register, disp int) {
	raw(3, 0, 0x4b, memory(tile, base, lineBy, uint32(disp)), base, lineBy)
}

func tileStore(tile byte, disp int) {
	raw(2, 0, 0x4b, memory(tile, result, lineBy, uint32(disp)), result, lineBy)
}

func tileZero(tile byte) { raw(3, 0, 0x49, []byte{0xc0 | tile<<3}) }

func tileRelease() { raw(0, 0, 0x49, []byte{0xc0}) }

// tileProduct adds the product of two tiles of BF16 numbers to a third.
func tileProduct(to, left, right byte) { raw(2, right, 0x5c, []byte{0xc0 | to<<3 | left}) }

// tileConfig makes all tiles 16 rows of 64 bytes. It uses lineBy.
func tileConfig() {
	const bytes, rows = 0x00400040, 0x10101010 // of two tiles, and of four
	LEAQ(all("tileShape", 1, 0, 0, 0, bytes, bytes, bytes, bytes, 0, 0, 0, 0, rows, rows, 0, 0), lineBy)
	raw(0, 0, 0x49, []byte{numbers[lineBy]}, lineBy)
	MOVQ(I64(64), lineBy)
}

// expand writes the kernel that turns 16 rows of a quantised type into tiles of BF16 numbers.
func expand(f format) string {
	name := "expand" + f.name
	TEXT(name, NOSPLIT, "func(dst *uint16, w *byte, blocks int)")
	Pragma("noescape")
	Doc(name + " writes 16 packed rows of " + f.name + " as BF16 in pairs of columns.")
	c := &context{vectors: vectors{wide: true}}
	c.w = Load(Param("w"), GP64())
	dst, n := Load(Param("dst"), GP64()), Load(Param("blocks"), GP64())
	Label("block")
	for u := range f.units {
		for p := range f.parts {
			scale := f.scale(c, u, p)
			var more VecVirtual // what is added to each number
			switch {
			case f.offset != nil:
				more = f.offset(c, u, p)
				if f.below {
					VPXORD(all("sign", 0x80000000), more, more)
				}
			case f.biased != 0:
				more = ZMM()
				VMULPS(float(fmt.Sprintf("less%d", f.biased), -float64(f.biased)), scale, more)
			}
			for j := p * 8 / f.parts; j < (p+1)*8/f.parts; j++ {
				expandQuad(c, f.quad(c, u, j), scale, more, Mem{Base: dst, Disp: u*1024 + j*128})
			}
		}
	}
	ADDQ(U32(uint32(f.bytes*16)), c.w)
	ADDQ(U32(uint32(f.units*1024)), dst)
	DECQ(n)
	JNZ(LabelRef("block"))
	VZEROUPPER()
	RET()
	return name
}

// expandQuad writes four columns, each a byte of q times scale and something more.
func expandQuad(c *context, q, scale, more VecVirtual, to Mem) {
	var col [4]VecVirtual
	for i := range col {
		v := ZMM()
		switch i {
		case 0:
			VPANDD(dwords(255), q, v)
		case 3:
			VPSRLD(Imm(24), q, v)
		default:
			VPSRLD(Imm(uint64(8*i)), q, v)
			VPANDD(dwords(255), v, v)
		}
		c.float(v)
		if more == nil {
			VMULPS(scale, v, v)
		} else {
			VFMADD213PS(more, scale, v)
		}
		VPADDD(dwords(0x8000), v, v) // to the nearest
		col[i] = v
	}
	for i := range 2 {
		low, high := col[2*i], col[2*i+1]
		VPSRLD(Imm(16), low, low)
		const choose = 0xec // what of high the mask has, or low
		VPTERNLOGD(Imm(choose), dwords(0xffff0000), low, high)
		VMOVDQU32(high, Mem{Base: to.Base, Disp: to.Disp + 64*i})
	}
}

// A float is kept as the sum of two BF16 numbers: the nearest, and the one nearest to what is left then. Together they are
// within 2^-18 of the number. Their bits are the upper halves.
func split(v VecVirtual) (high, low VecVirtual) {
	high, low = ZMM(), ZMM()
	VPADDD(dwords(0x8000), v, high)
	VPANDD(dwords(0xffff0000), high, high)
	VSUBPS(high, v, low)
	VPADDD(dwords(0x8000), low, low)
	return high, low
}

// splitRow writes the kernel that turns activations of one token into BF16 numbers, one or two for each.
func splitRow(planes int) {
	name := fmt.Sprintf("splitRow%d", planes)
	TEXT(name, NOSPLIT, "func(dst *uint16, x *float32, units int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s writes units of 32 numbers as %d BF16 each: the nearest, and if two 1024 bytes on the rest; a unit is %d bytes on.", name, planes, 1024*planes))
	dst, x, n := Load(Param("dst"), GP64()), Load(Param("x"), GP64()), Load(Param("units"), GP64())
	Label("unit")
	for i := range 2 {
		v := ZMM()
		VMOVUPS(Mem{Base: x, Disp: 64 * i}, v)
		parts := []VecVirtual{v, nil}
		if planes == 2 {
			parts[0], parts[1] = split(v)
		} else {
			VPADDD(dwords(0x8000), v, v)
		}
		for p, r := range parts[:planes] {
			VPSRLD(Imm(16), r, r)
			y := YMM()
			VPMOVDW(r, y)
			VMOVUPS(y, Mem{Base: dst, Disp: 1024*p + 32*i})
		}
	}
	ADDQ(U32(uint32(1024*planes)), dst)
	ADDQ(U32(128), x)
	DECQ(n)
	JNZ(LabelRef("unit"))
	VZEROUPPER()
	RET()
}

// splitCols writes the kernel that splits 16 packed rows of F16 or F32.
func splitCols(f string, size int) {
	TEXT("split"+f, NOSPLIT, "func(dst *uint16, w *byte, units int)")
	Pragma("noescape")
	Doc("split" + f + " writes 16 packed rows of " + f + " as BF16 in pairs of columns: for 32 columns the nearest, then the rest.")
	dst, w, n := Load(Param("dst"), GP64()), Load(Param("w"), GP64()), Load(Param("units"), GP64())
	v := vectors{wide: true}
	get := func(c int) VecVirtual {
		m := Mem{Base: w, Disp: c * size}
		if f == "F16" {
			return v.half(m)
		}
		return v.load(m)
	}
	Label("unit")
	for pair := range 16 {
		splitPair(v, func(c int) VecVirtual { return get(2*pair + c) }, Mem{Base: dst, Disp: 64 * pair})
	}
	ADDQ(U32(2048), dst)
	ADDQ(U32(uint32(32*size)), w)
	DECQ(n)
	JNZ(LabelRef("unit"))
	VZEROUPPER()
	RET()
}

// splitPair writes two columns, which get gives, and 1024 bytes on what is left of them.
func splitPair(v vectors, get func(c int) VecVirtual, to Mem) {
	high0, low0 := split(get(0))
	high1, low1 := split(get(1))
	VPANDD(dwords(0xffff0000), low1, low1)
	VMOVDQU32(v.or(high1, v.shift(16, high0)), to)
	to.Disp += 1024
	VMOVDQU32(v.or(low1, v.shift(16, low0)), to)
}

// tiles writes the kernel that multiplies two tiles of tokens with two groups of rows, numbers of which are the sums of as many
// BF16 numbers. The product of two low parts is too small to count.
func tiles(weights, activations int) {
	name := fmt.Sprintf("tiles%dx%d", weights, activations)
	TEXT(name, NOSPLIT, "func(dst *float32, w0, w1, x0, x1 *uint16, units int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s writes the products of units of 32 columns: of x0 with w0 and w1, and of x1 with both, each [16 tokens][16 rows].", name),
		fmt.Sprintf("A unit has %d BF16 for each weight and %d for each activation.", weights, activations))
	tileConfig()
	Load(Param("x0"), left[0])
	Load(Param("x1"), left[1])
	Load(Param("w0"), right[0])
	Load(Param("w1"), right[1])
	Load(Param("dst"), result)
	n := Load(Param("units"), GP64())
	for t := range byte(4) {
		tileZero(t)
	}
	const x, w = 4, 6 // tiles
	load := func(to byte, from [2]GPPhysical, part int) {
		for i, r := range from {
			tileLoad(to+byte(i), r, 1024*part)
		}
	}
	products := func() {
		for t := range byte(4) {
			tileProduct(t, x+t/2, w+t%2)
		}
	}
	Label("unit")
	load(w, right, 0)
	if activations == 2 {
		load(x, left, 1)
		products()
	}
	load(x, left, 0)
	products()
	if weights == 2 {
		load(w, right, 1)
		products()
	}
	for i := range 2 {
		ADDQ(U32(uint32(activations*1024)), left[i])
		ADDQ(U32(uint32(weights*1024)), right[i])
	}
	DECQ(n)
	JNZ(LabelRef("unit"))
	for t := range byte(4) {
		tileStore(t, int(t)*1024)
	}
	tileRelease()
	VZEROUPPER()
	RET()
}

// addTile writes the kernel that adds a product of tiles to where it belongs.
func addTile() {
	TEXT("addTile", NOSPLIT, "func(dst *float32, stride int, tile *float32)")
	Pragma("noescape")
	Doc("addTile adds [16 tokens][16 rows] to dst, whose tokens are stride floats apart.")
	dst, stride, tile := Load(Param("dst"), GP64()), Load(Param("stride"), GP64()), Load(Param("tile"), GP64())
	for t := range 16 {
		v := ZMM()
		VMOVUPS(Mem{Base: tile, Disp: 64 * t}, v)
		VADDPS(Mem{Base: dst}, v, v)
		VMOVUPS(v, Mem{Base: dst})
		LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
	}
	VZEROUPPER()
	RET()
}
