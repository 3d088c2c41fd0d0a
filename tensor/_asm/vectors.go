package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// vectors emits operations on vectors of one 32-bit lane a row: 16 rows in 512 bits, or 8 in 256, where a group of 16 rows
// has two halves.
type vectors struct {
	wide bool
}

func (v vectors) isa() string {
	if v.wide {
		return "AVX512"
	}
	return "AVX2"
}

// tokens are the numbers of tokens that there are kernels for: tensor.tileSizes.
func (v vectors) tokens() []int {
	if v.wide {
		return []int{1, 4, 8}
	}
	return []int{1, 4} // 16 registers do not hold more sums
}

func (v vectors) new() VecVirtual {
	if v.wide {
		return ZMM()
	}
	return YMM()
}

// passes says which halves of a group are computed together: both while there are registers.
func (v vectors) passes(tokens int) [][]int {
	switch {
	case v.wide:
		return [][]int{{0}}
	case tokens == 1:
		return [][]int{{0, 1}}
	}
	return [][]int{{0}, {1}}
}

// at is a half's share of a piece: size bytes of each row, where a block starts at w and the piece at byte offset of each
// row's block.
func at(w Register, offset, size, half int) Mem {
	return Mem{Base: w, Disp: offset*16 + half*8*size}
}

func (v vectors) load(m Op) VecVirtual {
	r := v.new()
	if v.wide {
		VMOVDQU32(m, r)
	} else {
		VMOVDQU(m, r)
	}
	return r
}

func (v vectors) zero() VecVirtual {
	r := v.new()
	if v.wide {
		VPXORD(r, r, r)
	} else {
		VPXOR(r, r, r)
	}
	return r
}

// and computes into its register; m may be memory.
func (v vectors) and(m Op, r VecVirtual) VecVirtual {
	if v.wide {
		VPANDD(m, r, r)
	} else {
		VPAND(m, r, r)
	}
	return r
}

func (v vectors) or(m Op, r VecVirtual) VecVirtual {
	if v.wide {
		VPORD(m, r, r)
	} else {
		VPOR(m, r, r)
	}
	return r
}

func (v vectors) xor(m Op, r VecVirtual) VecVirtual {
	if v.wide {
		VPXORD(m, r, r)
	} else {
		VPXOR(m, r, r)
	}
	return r
}

// shift moves the bits of each lane to the right, or to the left by -n.
func (v vectors) shift(n int, r VecVirtual) VecVirtual {
	switch {
	case n > 0:
		VPSRLD(Imm(uint64(n)), r, r)
	case n < 0:
		VPSLLD(Imm(uint64(-n)), r, r)
	}
	return r
}

// half widens a half of each row.
func (v vectors) half(m Op) VecVirtual {
	r := v.new()
	VCVTPH2PS(m, r)
	return r
}

// words widens an unsigned 16-bit number of each row.
func (v vectors) words(m Op) VecVirtual {
	r := v.new()
	VPMOVZXWD(m, r)
	return r
}

func (v vectors) float(r VecVirtual) VecVirtual {
	VCVTDQ2PS(r, r)
	return r
}

// all returns a constant of 64 bytes made of 32-bit words, each written once however often it is asked for.
func all(name string, words ...uint32) Mem {
	if m, ok := constants[name]; ok {
		return m
	}
	m := GLOBL(name, RODATA|NOPTR)
	for i := range 16 {
		DATA(i*4, U32(words[i%len(words)]))
	}
	constants[name] = m
	return m
}

var constants = map[string]Mem{}

// bytes is a constant with every byte b.
func bytes(b byte) Mem {
	return all(fmt.Sprintf("bytes%02x", b), uint32(b)*0x01010101)
}

// dwords is a constant with every 32-bit lane n.
func dwords(n uint32) Mem {
	return all(fmt.Sprintf("dwords%08x", n), n)
}

// levels are the IQ4 types' sixteen, with 128 added, as VPSHUFB wants them.
func levels() Mem {
	return all("levels", 0x3f2d1801, 0x766a5d4f, 0xa6998d81, 0xf1d9c5b5)
}
