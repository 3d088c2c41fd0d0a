package main

import (
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Neither avo nor Go's assembler know AVX512_BF16's VDPBF16PS, which adds to each lane the products of two pairs of BF16 numbers.

// pairProduct emits VDPBF16PS of three registers.
func pairProduct(a, b, to byte) {
	code := []byte{0x62, // EVEX: the upper bits of registers are inverted
		0x02 | (^to>>3&1)<<7 | (^b>>4&1)<<6 | (^b>>3&1)<<5 | (^to>>4&1)<<4,
		0x06 | (^a&15)<<3,
		0x40 | (^a>>4&1)<<3,
		0x52,
		0xc0 | to&7<<3 | b&7,
	}
	for _, c := range code {
		Instruction(&ir.Instruction{Opcode: "BYTE", Operands: []Op{U8(c)}})
	}
}

var zmm = [32]VecPhysical{Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15,
	Z16, Z17, Z18, Z19, Z20, Z21, Z22, Z23, Z24, Z25, Z26, Z27, Z28, Z29, Z30, Z31}

// pairs writes the kernel that multiplies 32 rows of BF16, in two groups, with 8 tokens.
func pairs() {
	const tokens, groups, steps, x, w = 8, 2, 4, 31, 28
	TEXT("pairsBF16", NOSPLIT, "func(dst *float32, stride int, w0, w1 *byte, x *uint16, xstride int, cols, ahead int)")
	Pragma("noescape")
	Doc("pairsBF16 adds the products of w0 and of w1, 16 packed rows of BF16 each, with 8 tokens in BF16, xstride numbers apart.",
		"Those of w1 go to dst 16 floats on. cols is a multiple of 8.")
	base := [2]Register{Load(Param("w0"), GP64()), Load(Param("w1"), GP64())}
	n := Load(Param("cols"), GP64())
	ahead := Load(Param("ahead"), GP64())
	at := strided("x", "xstride", tokens, 2)
	dst, stride := GP64(), GP64()
	results := func(visit func(i byte, m Mem)) {
		Load(Param("dst"), dst)
		Load(Param("stride"), stride)
		for t := range byte(tokens) {
			for g := range byte(groups) {
				visit(groups*t+g, Mem{Base: dst, Disp: 64 * int(g)})
			}
			if t < tokens-1 {
				LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
			}
		}
	}
	results(func(i byte, m Mem) { VMOVUPS(m, zmm[i]) })
	Label("loop")
	for s := range steps {
		for g := range base {
			VMOVUPS(Mem{Base: base[g], Disp: 64 * s}, zmm[w+g])
		}
		for t := range byte(tokens) {
			b := x - t&1
			VPBROADCASTD(at.at(int(t), 4*s), zmm[b])
			for g := range byte(groups) {
				pairProduct(w+g, b, groups*t+g)
			}
		}
	}
	TESTQ(ahead, ahead)
	JZ(LabelRef("near"))
	for g := range base {
		prefetch(base[g], ahead, 0, 64*steps)
	}
	Label("near")
	for g := range base {
		ADDQ(U32(64*steps), base[g])
	}
	for _, b := range at.bases {
		ADDQ(U32(4*steps), b)
	}
	SUBQ(Imm(2*steps), n)
	JG(LabelRef("loop"))
	results(func(i byte, m Mem) { VMOVUPS(zmm[i], m) })
	VZEROUPPER()
	RET()
}

// shorten writes the kernel that rounds activations to BF16.
func shorten() {
	TEXT("shorten", NOSPLIT, "func(dst *uint16, x *float32, n int)")
	Pragma("noescape")
	Doc("shorten rounds n numbers, a multiple of 16, to the nearest in BF16.")
	dst, x, n := Load(Param("dst"), GP64()), Load(Param("x"), GP64()), Load(Param("n"), GP64())
	Label("next")
	v, y := ZMM(), YMM()
	VMOVUPS(Mem{Base: x}, v)
	VPADDD(dwords(0x8000), v, v)
	VPSRLD(Imm(16), v, v)
	VPMOVDW(v, y)
	VMOVUPS(y, Mem{Base: dst})
	ADDQ(Imm(64), x)
	ADDQ(Imm(32), dst)
	SUBQ(Imm(16), n)
	JG(LabelRef("next"))
	VZEROUPPER()
	RET()
}
