package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Eight-bit floats become halves by shifts: those of 5 bits of exponent are the upper halves of such, and those of 4 bits are
// halves of another range, which a factor makes good.
type eight struct {
	name   string
	factor float64
}

var eights = []eight{{"F8_E4M3", 256}, {"F8_E5M2", 1}}

// The bytes of a packed block: scales, then 64 columns of 16 rows.
const (
	eightScales  = 64
	eightColumns = 64
	eightBytes   = eightScales + 16*eightColumns
)

// column gives a half's share of column i of a block as floats, without the factor.
func (e eight) column(v vectors, w Register, half, i int) VecVirtual {
	m := Mem{Base: w, Disp: eightScales + 16*i + 8*half}
	h := VecVirtual(YMM())
	if !v.wide {
		h = XMM()
	}
	if e.factor == 1 {
		VPMOVZXBW(m, h)
		VPSLLW(Imm(8), h, h)
	} else {
		VPMOVSXBW(m, h)
		VPSLLW(Imm(7), h, h)
		v.and(all("eightBits", 0xbfffbfff), h) // the sign stands twice
	}
	r := v.new()
	VCVTPH2PS(h, r)
	return r
}

// scale gives the scales of a block, times the factor.
func (e eight) scale(v vectors, w Register, half int) VecVirtual {
	s := v.load(Mem{Base: w, Disp: 32 * half})
	if e.factor != 1 {
		VMULPS(float("eightFactor", e.factor), s, s)
	}
	return s
}

// cols writes the kernel of 16 rows times float activations of some tokens, as those of other floats. It returns the name.
func (e eight) cols(v vectors, tokens int) string {
	name := fmt.Sprintf("cols%s%sx%d", e.name, v.isa(), tokens)
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, w *byte, x *float32, xstride int, cols, ahead int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s adds the products of 16 packed rows of %s with %d token(s), xstride floats apart.", name, e.name, tokens))
	for i, halves := range v.passes(tokens) {
		w, n := Load(Param("w"), GP64()), Load(Param("cols"), GP64())
		x, fetch := strided("x", "xstride", tokens, 4), newFetcher(tokens)
		acc := make([][]VecVirtual, tokens)
		results(tokens, halves, v, func(t, _ int, m Mem) { acc[t] = append(acc[t], v.load(m)) })
		block := fmt.Sprintf("block%d", i)
		Label(block)
		chains := max(1, 4/tokens)
		sums := make([][]VecVirtual, chains*tokens) // of the block, before its scales
		for c := range sums {
			for range halves {
				sums[c] = append(sums[c], v.zero())
			}
		}
		for c := range eightColumns {
			for h, half := range halves {
				vec := e.column(v, w, half, c)
				for t := range tokens {
					sum := sums[c%chains*tokens+t][h]
					if v.wide {
						VFMADD231PS_BCST(x.at(t, 4*c), vec, sum)
						continue
					}
					b := YMM()
					VBROADCASTSS(x.at(t, 4*c), b)
					VFMADD231PS(b, vec, sum)
				}
			}
			if c%4 == 3 {
				fetch.prefetch(i, w, (c-3)*eightBytes/eightColumns, (c+1)*eightBytes/eightColumns)
			}
		}
		for h, half := range halves {
			scale := e.scale(v, w, half)
			for t := range tokens {
				for c := 1; c < chains; c++ {
					VADDPS(sums[c*tokens+t][h], sums[t][h], sums[t][h])
				}
				VFMADD231PS(scale, sums[t][h], acc[t][h])
			}
		}
		ADDQ(U32(eightBytes), w)
		for _, b := range x.bases {
			ADDQ(U32(4*eightColumns), b)
		}
		SUBQ(Imm(eightColumns), n)
		JG(LabelRef(block))
		results(tokens, halves, v, func(t, h int, m Mem) { VMOVUPS(acc[t][h], m) })
	}
	VZEROUPPER()
	RET()
	return name
}

// split writes the kernel that makes of 16 packed rows two BF16 numbers each, as splitCols does; units are even.
func (e eight) split() string {
	name := "split" + e.name
	TEXT(name, NOSPLIT, "func(dst *uint16, w *byte, units int)")
	Pragma("noescape")
	Doc(name + " writes 16 packed rows of " + e.name + " as BF16 in pairs of columns: for 32 columns the nearest, then the rest. units is even.")
	dst, w, n := Load(Param("dst"), GP64()), Load(Param("w"), GP64()), Load(Param("units"), GP64())
	v := vectors{wide: true}
	Label("block")
	scale := e.scale(v, w, 0)
	for pair := range eightColumns / 2 {
		splitPair(v, func(c int) VecVirtual {
			r := e.column(v, w, 0, 2*pair+c)
			VMULPS(scale, r, r)
			return r
		}, Mem{Base: dst, Disp: pair/16*2048 + pair%16*64})
	}
	ADDQ(U32(4096), dst)
	ADDQ(U32(eightBytes), w)
	SUBQ(Imm(2), n)
	JG(LabelRef("block"))
	VZEROUPPER()
	RET()
	return name
}
