package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// cols writes the kernel of a type that is not quantised: 16 rows times float activations of some tokens, column by column. It returns the name.
func cols(f string, v vectors, tokens int) string {
	name := fmt.Sprintf("cols%s%sx%d", f, v.isa(), tokens)
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, w *byte, x *float32, xstride int, cols, ahead int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s adds the products of 16 packed rows of %s with %d token(s), xstride floats apart.", name, f, tokens))
	size := map[string]int{"F32": 64, "F16": 32, "BF16": 32, "Int8": 16, "Int4": 8}[f] // bytes of a column
	for i, halves := range v.passes(tokens) {
		w, n := Load(Param("w"), GP64()), Load(Param("cols"), GP64())
		x, fetch := strided("x", "xstride", tokens, 4), newFetcher(tokens)
		chains := max(1, 4/tokens) // sums of their own, to hide that each waits for the one before
		acc := make([][]VecVirtual, chains)
		results(tokens, halves, v, func(_, _ int, m Mem) { acc[0] = append(acc[0], v.load(m)) })
		for c := 1; c < chains; c++ {
			for range acc[0] {
				acc[c] = append(acc[c], v.zero())
			}
		}
		step := 4
		column := func(steps int) {
			for c := 0; c < steps; {
				c += columns(f, v, w, x, tokens, halves, c, acc)
			}
			fetch.prefetch(i, w, 0, size*steps)
			ADDQ(U32(uint32(size*steps)), w)
			for _, b := range x.bases {
				ADDQ(U32(uint32(4*steps)), b)
			}
		}
		few, four, end := fmt.Sprintf("few%d", i), fmt.Sprintf("four%d", i), fmt.Sprintf("end%d", i)
		SUBQ(Imm(uint64(step)), n)
		JLT(LabelRef(few))
		Label(four)
		column(step)
		SUBQ(Imm(uint64(step)), n)
		JGE(LabelRef(four))
		Label(few)
		ADDQ(Imm(uint64(step)), n)
		JLE(LabelRef(end))
		least := map[string]int{"F32": 1, "F16": 1, "BF16": 2, "Int8": 1, "Int4": 2}[f]
		one := fmt.Sprintf("one%d", i)
		Label(one)
		column(least)
		SUBQ(Imm(uint64(least)), n)
		JGT(LabelRef(one))
		Label(end)
		for c := 1; c < chains; c++ {
			for j := range acc[0] {
				VADDPS(acc[c][j], acc[0][j], acc[0][j])
			}
		}
		j := 0
		results(tokens, halves, v, func(_, _ int, m Mem) { VMOVUPS(acc[0][j], m); j++ })
	}
	VZEROUPPER()
	RET()
	return name
}

// columns adds one column, or the two that a lane of BF16 or a byte of Int4 holds, and returns how many.
func columns(f string, v vectors, w Register, x strides, tokens int, halves []int, c int, acc [][]VecVirtual) int {
	vecs := make([][]VecVirtual, 0, 2)
	load := func(get func(half int) VecVirtual) {
		var one []VecVirtual
		for _, half := range halves {
			one = append(one, get(half))
		}
		vecs = append(vecs, one)
	}
	switch f {
	case "F32":
		load(func(half int) VecVirtual { return v.load(Mem{Base: w, Disp: c*64 + half*32}) })
	case "F16":
		load(func(half int) VecVirtual { return v.half(Mem{Base: w, Disp: c*32 + half*16}) })
	case "Int8":
		load(func(half int) VecVirtual { return v.float(v.signed(Mem{Base: w, Disp: c*16 + half*8})) })
	case "Int4":
		var low []VecVirtual
		for _, half := range halves {
			low = append(low, v.unsigned(Mem{Base: w, Disp: c*8 + half*8}))
		}
		at := func(half int) VecVirtual { return low[half-halves[0]] }
		load(func(half int) VecVirtual { return v.level(at(half)) })
		load(func(half int) VecVirtual { return v.level(v.shift(4, at(half))) })
	case "BF16":
		m := func(half int) Mem { return Mem{Base: w, Disp: c*32 + half*32} }
		load(func(half int) VecVirtual { return v.shift(-16, v.load(m(half))) })
		load(func(half int) VecVirtual { return v.and(dwords(0xffff0000), v.load(m(half))) })
	}
	for i, vec := range vecs {
		for t := range tokens {
			if v.wide {
				VFMADD231PS_BCST(x.at(t, (c+i)*4), vec[0], acc[(c+i)%len(acc)][t])
				continue
			}
			b := YMM()
			VBROADCASTSS(x.at(t, (c+i)*4), b)
			for h := range halves {
				VFMADD231PS(b, vec[h], acc[(c+i)%len(acc)][t*len(halves)+h])
			}
		}
	}
	return len(vecs)
}

// strides reaches up to eight rows of an array by two bases and two index registers.
type strides struct {
	bases      []Register
	one, three Register
}

// strided makes it of two parameters: the stride is in numbers of size bytes.
func strided(base, stride string, rows, size int) strides {
	s := strides{bases: []Register{Load(Param(base), GP64())}}
	if rows == 1 {
		return s
	}
	one := Load(Param(stride), GP64())
	SHLQ(Imm(uint64(size/2)), one)
	s.one = one
	if rows > 2 {
		three := GP64()
		LEAQ(Mem{Base: one, Index: one, Scale: 2}, three)
		s.three = three
	}
	if rows > 4 {
		second := GP64()
		LEAQ(Mem{Base: s.bases[0], Index: one, Scale: 4}, second)
		s.bases = append(s.bases, second)
	}
	return s
}

func (s strides) at(row, disp int) Mem {
	m := Mem{Base: s.bases[row/4], Disp: disp}
	switch row % 4 {
	case 1:
		m.Index, m.Scale = s.one, 1
	case 2:
		m.Index, m.Scale = s.one, 2
	case 3:
		m.Index, m.Scale = s.three, 1
	}
	return m
}

// sweep reads memory as fast as can be, for the figure that others are held against.
func sweep() {
	TEXT("sweepVector", NOSPLIT, "func(p *byte, n int) uint64")
	Pragma("noescape")
	Doc("sweepVector reads n bytes, a multiple of 256, and returns some of the bits that it read.")
	v := vectors{}
	p, n := Load(Param("p"), GP64()), Load(Param("n"), GP64())
	var acc [8]VecVirtual
	for i := range acc {
		acc[i] = v.zero()
	}
	Label("loop")
	for i := range acc {
		v.or(Mem{Base: p, Disp: 32 * i}, acc[i])
	}
	prefetch(p, nil, 0, 256)
	ADDQ(U32(256), p)
	SUBQ(U32(256), n)
	JNZ(LabelRef("loop"))
	for _, a := range acc[1:] {
		v.or(a, acc[0])
	}
	r := GP64()
	VMOVQ(acc[0].AsX(), r)
	Store(r, ReturnIndex(0))
	VZEROUPPER()
	RET()
}
