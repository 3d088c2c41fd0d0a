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
	left   = RSI // activations: a row of a tile is a token
	right  = RDI // weights: a row of a tile is 4 bytes of columns, or 2 halves, of 16 rows
	result = RDX // memory for results
	leftBy = RAX // bytes between rows of left tiles
	lineBy = RCX // 64: bytes between rows of right and of result tiles
)

var numbers = map[Register]byte{RAX: 0, RCX: 1, RDX: 2, RSI: 6, RDI: 7}

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

func tileLoad(tile byte, base, by Register, disp int) {
	raw(3, 0, 0x4b, memory(tile, base, by, uint32(disp)), base, by)
}

func tileStore(tile byte, disp int) {
	raw(2, 0, 0x4b, memory(tile, result, lineBy, uint32(disp)), result, lineBy)
}

func tileZero(tile byte) { raw(3, 0, 0x49, []byte{0xc0 | tile<<3}) }

func tileRelease() { raw(0, 0, 0x49, []byte{0xc0}) }

// tileProduct adds the product of two tiles of signed bytes, or of BF16 numbers, to a third.
func tileProduct(bytes bool, to, left, right byte) {
	if bytes {
		raw(3, right, 0x5e, []byte{0xc0 | to<<3 | left})
	} else {
		raw(2, right, 0x5c, []byte{0xc0 | to<<3 | left})
	}
}

// tileConfig sets the shapes of tiles: rows and bytes of a row. It uses lineBy.
func tileConfig(name string, rows, width [8]byte) {
	m := GLOBL(name, RODATA|NOPTR)
	var c [64]byte
	c[0] = 1
	for t := range 8 {
		c[16+2*t], c[48+t] = width[t], rows[t]
	}
	for i, b := range c {
		DATA(i, U8(b))
	}
	LEAQ(m, lineBy)
	raw(0, 0, 0x49, []byte{numbers[lineBy]}, lineBy)
	MOVQ(I64(64), lineBy)
}

// tileTokens is how many tokens a tile has.
const tileTokens = 16

// unpack writes the kernel that takes apart 16 rows of a type: bytes, made signed, as tiles of 32 columns, and for each of
// these the scales of its parts and then what is added, 16 floats each.
func unpack(f format) string {
	name := "unpack" + f.name
	TEXT(name, NOSPLIT, "func(bytes *int8, scales *float32, w *byte, blocks int)")
	Pragma("noescape")
	Doc(name + " takes 16 packed rows of " + f.name + " apart for AMX.")
	c := &context{vectors: vectors{wide: true}}
	c.w = Load(Param("w"), GP64())
	bytesTo, scales, n := Load(Param("bytes"), GP64()), Load(Param("scales"), GP64()), Load(Param("blocks"), GP64())
	each := f.parts
	if f.offset != nil {
		each *= 2
	}
	Label("block")
	for u := range f.units {
		for j := range 8 {
			q := f.quad(c, u, j)
			if f.biased != 0 {
				VPSUBB(bytes(f.biased), q, q)
			}
			VMOVDQU32(q, Mem{Base: bytesTo, Disp: u*512 + j*64})
		}
		for p := range f.parts {
			VMOVUPS(f.scale(c, u, p), Mem{Base: scales, Disp: (u*each + p) * 64})
			if f.offset == nil {
				continue
			}
			o := f.offset(c, u, p)
			if f.below {
				VPXORD(all("sign", 0x80000000), o, o)
			}
			VMOVUPS(o, Mem{Base: scales, Disp: (u*each + f.parts + p) * 64})
		}
	}
	ADDQ(U32(uint32(f.bytes*16)), c.w)
	ADDQ(U32(uint32(f.units*512)), bytesTo)
	ADDQ(U32(uint32(f.units*each*64)), scales)
	DECQ(n)
	JNZ(LabelRef("block"))
	VZEROUPPER()
	RET()
	return name
}

// tileDot writes the kernel that multiplies what unpack wrote with tiles of 16 tokens of rounded activations. While the vector
// units scale the results of one step, AMX computes the next: results go through memory, and it takes long until they are there.
func tileDot(parts int, offset bool) {
	name := fmt.Sprintf("tileDot%d", parts)
	if offset {
		name += "Offset"
	}
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, bytes *int8, scales *float32, q *int8, d *float32, s *uint32, units, skip, tiles int, scratch *byte)")
	Pragma("noescape")
	Doc(name+" adds the products of 16 rows with tiles of 16 tokens of an even number of units, 32 columns each.",
		"Tiles have skip units more. 1024 bytes after the last of bytes and of q may be read. scratch is 4096 bytes on a page.")
	// A step is two products: two units, or both parts of one.
	rows, width := byte(8), byte(32)
	if parts == 2 {
		rows, width = 4, 16
	}
	tileConfig(name+"Shape", [8]byte{16, 16, 16, 16, rows, rows}, [8]byte{64, 64, width, width, 64, 64})
	MOVQ(I64(32), leftBy)
	Load(Param("q"), left)
	Load(Param("scratch"), result)
	k := tileKernel{parts: parts, offset: offset, d: Load(Param("d"), GP64()), s: Load(Param("s"), GP64()), scales: GP64(), ready: GP64()}
	tiles, n, dst := Load(Param("tiles"), GP64()), GP64(), Load(Param("dst"), GP64())
	units := 2 / parts
	Label("tile")
	Load(Param("bytes"), right)
	Load(Param("scales"), k.scales)
	Load(Param("units"), n)
	k.visit(dst, func(t int, m Mem) { k.acc[t] = ZMM(); VMOVUPS(m, k.acc[t]) })
	k.multiply()
	Label("step")
	MOVQ(result, k.ready)
	XORQ(U32(2048), result)
	ADDQ(U32(uint32(units*512)), left)
	ADDQ(U32(uint32(units*512)), right)
	k.multiply()
	k.scaleUp()
	ADDQ(U32(uint32(units*tileTokens*4)), k.d)
	ADDQ(U32(uint32(units*tileTokens*4*parts)), k.s)
	ADDQ(U32(uint32(units*k.each()*64)), k.scales)
	SUBQ(Imm(uint64(units)), n)
	JG(LabelRef("step"))
	k.visit(dst, func(t int, m Mem) { VMOVUPS(k.acc[t], m) })
	next := Load(Param("stride"), GP64())
	SHLQ(Imm(6), next)
	ADDQ(next, dst)
	skip := Load(Param("skip"), GP64())
	SHLQ(Imm(6), skip) // bytes of d
	ADDQ(skip, k.d)
	LEAQ(Mem{Base: k.s, Index: skip, Scale: uint8(parts)}, k.s)
	LEAQ(Mem{Base: left, Index: skip, Scale: 8}, left)
	DECQ(tiles)
	JNZ(LabelRef("tile"))
	tileRelease()
	VZEROUPPER()
	RET()
}

// A tileKernel is a tileDot being written.
type tileKernel struct {
	parts               int
	offset              bool
	d, s, scales, ready Register // ready: results of the step before
	acc                 [tileTokens]VecVirtual
}

// each is how many vectors of scales a unit has.
func (k *tileKernel) each() int {
	if k.offset {
		return 2 * k.parts
	}
	return k.parts
}

// visit calls f with where the sums of each token are.
func (k *tileKernel) visit(dst Register, f func(t int, m Mem)) {
	stride, at := Load(Param("stride"), GP64()), GP64()
	MOVQ(dst, at)
	for t := range k.acc {
		f(t, Mem{Base: at})
		LEAQ(Mem{Base: at, Index: stride, Scale: 4}, at)
	}
}

// multiply computes both products of a step.
func (k *tileKernel) multiply() {
	leftApart, rightApart := 512, 512
	if k.parts == 2 {
		leftApart, rightApart = 16, 256
	}
	for i := range 2 {
		c, a, b := byte(i), byte(2+i), byte(4+i)
		tileZero(c)
		tileLoad(a, left, leftBy, i*leftApart)
		tileLoad(b, right, lineBy, i*rightApart)
		tileProduct(true, c, a, b)
		tileStore(c, i*1024)
	}
}

// scaleUp adds the products of a step, times their scales.
func (k *tileKernel) scaleUp() {
	for u := range 2 / k.parts {
		for p := range k.parts {
			scale, more := ZMM(), ZMM()
			VMOVUPS(Mem{Base: k.scales, Disp: (u*k.each() + p) * 64}, scale)
			if k.offset {
				VMOVUPS(Mem{Base: k.scales, Disp: (u*k.each() + k.parts + p) * 64}, more)
			}
			for t, acc := range k.acc {
				f := ZMM()
				VCVTDQ2PS(Mem{Base: k.ready, Disp: (u+p)*1024 + t*64}, f)
				VMULPS(scale, f, f)
				VFMADD231PS_BCST(Mem{Base: k.d, Disp: (u*tileTokens + t) * 4}, f, acc)
				if k.offset {
					VFMADD231PS_BCST(Mem{Base: k.s, Disp: ((u*tileTokens+t)*k.parts + p) * 4}, more, acc)
				}
			}
		}
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

// splitRow writes the kernel that splits activations of one token.
func splitRow() {
	TEXT("splitRow", NOSPLIT, "func(dst *uint16, x *float32, units int)")
	Pragma("noescape")
	Doc("splitRow writes units of 32 numbers as BF16: the nearest, and 1024 bytes on the rest; a unit is 2048 bytes on.")
	dst, x, n := Load(Param("dst"), GP64()), Load(Param("x"), GP64()), Load(Param("units"), GP64())
	Label("unit")
	for i := range 2 {
		v := ZMM()
		VMOVUPS(Mem{Base: x, Disp: 64 * i}, v)
		high, low := split(v)
		for p, r := range []VecVirtual{high, low} {
			VPSRLD(Imm(16), r, r)
			y := YMM()
			VPMOVDW(r, y)
			VMOVUPS(y, Mem{Base: dst, Disp: 1024*p + 32*i})
		}
	}
	ADDQ(U32(2048), dst)
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
		high0, low0 := split(get(2 * pair))
		high1, low1 := split(get(2*pair + 1))
		VPANDD(dwords(0xffff0000), low1, low1)
		VMOVDQU32(v.or(high1, v.shift(16, high0)), Mem{Base: dst, Disp: 64 * pair})
		VMOVDQU32(v.or(low1, v.shift(16, low0)), Mem{Base: dst, Disp: 1024 + 64*pair})
	}
	ADDQ(U32(2048), dst)
	ADDQ(U32(uint32(32*size)), w)
	DECQ(n)
	JNZ(LabelRef("unit"))
	VZEROUPPER()
	RET()
}

// tileCols writes the kernel that multiplies weights in BF16, or such that have been split, with split activations.
func tileCols(planes int) {
	name := fmt.Sprintf("tileCols%d", planes)
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, w *byte, x *uint16, units, tiles int, scratch *byte)")
	Pragma("noescape")
	Doc(name+" adds the products of 16 rows of weights, of as many BF16 numbers each as the name says, with tiles of 16 tokens.",
		"scratch is 3072 bytes on a cache line.")
	tileConfig(name+"Shape", [8]byte{16, 16, 16, 16, 16, 16, 16}, [8]byte{64, 64, 64, 64, 64, 64, 64})
	Load(Param("x"), left)
	Load(Param("scratch"), result)
	tiles, n, dst := Load(Param("tiles"), GP64()), GP64(), Load(Param("dst"), GP64())
	Label("tile")
	Load(Param("w"), right)
	Load(Param("units"), n)
	for c := range byte(planes + 1) {
		tileZero(c)
	}
	Label("unit")
	tileLoad(3, left, lineBy, 0)
	tileLoad(4, left, lineBy, 1024)
	tileLoad(5, right, lineBy, 0)
	tileProduct(false, 0, 3, 5)
	tileProduct(false, 1, 4, 5)
	if planes == 2 {
		tileLoad(6, right, lineBy, 1024)
		tileProduct(false, 2, 3, 6)
	}
	ADDQ(U32(2048), left)
	ADDQ(U32(uint32(planes*1024)), right)
	DECQ(n)
	JNZ(LabelRef("unit"))
	for c := range planes + 1 {
		tileStore(byte(c), c*1024)
	}
	stride := Load(Param("stride"), GP64())
	for t := range tileTokens {
		v := ZMM()
		VMOVUPS(Mem{Base: result, Disp: 64 * t}, v)
		for c := 1; c <= planes; c++ {
			VADDPS(Mem{Base: result, Disp: c*1024 + 64*t}, v, v)
		}
		VADDPS(Mem{Base: dst}, v, v)
		VMOVUPS(v, Mem{Base: dst})
		LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
	}
	DECQ(tiles)
	JNZ(LabelRef("tile"))
	tileRelease()
	VZEROUPPER()
	RET()
}
