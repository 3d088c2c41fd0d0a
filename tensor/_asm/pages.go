package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// What pages of rounded keys and values need beside products.

// signed widens a signed byte of each row.
func (v vectors) signed(m Op) VecVirtual {
	r := v.new()
	VPMOVSXBD(m, r)
	return r
}

// unsigned widens a byte of each row.
func (v vectors) unsigned(m Op) VecVirtual {
	r := v.new()
	VPMOVZXBD(m, r)
	return r
}

// magnitudes are those of Int4: tensor.levels.
var magnitudes = [8]float32{0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326}

// level returns the numbers that the lower nibbles of r stand for, and leaves r.
func (v vectors) level(r VecVirtual) VecVirtual {
	words := make([]uint32, 16)
	for i, m := range magnitudes {
		words[i], words[i+8] = math.Float32bits(m), math.Float32bits(-m)
	}
	x := v.new()
	if v.wide {
		table := ZMM()
		VMOVUPS(all("gauss", words...), table)
		VPERMPS(table, r, x)
		return x
	}
	VPERMPS(all("gauss", words...), r, x) // by the lower three bits
	sign := YMM()
	VPSLLD(Imm(28), r, sign)
	VPAND(all("sign", 0x80000000), sign, sign)
	VPXOR(sign, x, x)
	return x
}

// halves writes the kernels on rows of F16.
func halves() {
	TEXT("dotHalfVector", NOSPLIT, "func(x *float32, n int, h *byte) float32")
	Pragma("noescape")
	Doc("dotHalfVector multiplies n numbers, a multiple of 8, with as many in F16.")
	x, n, h := Load(Param("x"), GP64()), Load(Param("n"), GP64()), Load(Param("h"), GP64())
	sum := YMM()
	VXORPS(sum, sum, sum)
	rowLoop(n, []Register{x}, func() {
		w := YMM()
		VCVTPH2PS(Mem{Base: h}, w)
		VFMADD231PS(Mem{Base: x}, w, sum)
		ADDQ(Imm(16), h)
	})
	across(sum, VADDPS)
	Store(sum.AsX(), ReturnIndex(0))
	VZEROUPPER()
	RET()

	TEXT("mulHalfVector", NOSPLIT, "func(x *float32, n int, h *byte)")
	Pragma("noescape")
	Doc("mulHalfVector multiplies n numbers, a multiple of 8, by as many in F16.")
	x, n, h = Load(Param("x"), GP64()), Load(Param("n"), GP64()), Load(Param("h"), GP64())
	rowLoop(n, []Register{x}, func() {
		w := YMM()
		VCVTPH2PS(Mem{Base: h}, w)
		VMULPS(Mem{Base: x}, w, w)
		VMOVUPS(w, Mem{Base: x})
		ADDQ(Imm(16), h)
	})
	VZEROUPPER()
	RET()
}
