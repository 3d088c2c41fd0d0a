package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// two writes the kernel that multiplies two groups of rows with eight tokens, as two of dot's would, to the bit. What
// holds those up is that each product reads its activations from memory; here two share them, and the sixteen sums of whole
// numbers under way are more than the products' latency. The registers hold those and the results of the first group; the
// second's are on the stack. It returns the name.
func two(f format) string {
	const tokens = 8
	name := "two" + f.name
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, w0, w1 *byte, q *int8, d *float32, s *uint32, blocks, ahead int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s adds the products of w0 and of w1, 16 packed rows of %s each, with %d tokens. Those of w1 go to dst 16 floats on.", name, f.name, tokens))
	k := &kernel{context: context{vectors: vectors{wide: true}}, f: f, tokens: tokens}
	w := [2]Register{Load(Param("w0"), GP64()), Load(Param("w1"), GP64())}
	k.q, k.d, k.s = Load(Param("q"), GP64()), Load(Param("d"), GP64()), Load(Param("s"), GP64())
	blocks, fetch := Load(Param("blocks"), GP64()), newFetcher(tokens)
	k.acc = make([][]VecVirtual, tokens)
	stack := AllocLocal(tokens * 64)
	// A group's results lie where dot's halves would, if those were of 16 rows.
	results(tokens, []int{0, 2}, k.vectors, func(t, g int, m Mem) {
		r := k.load(m)
		if g == 0 {
			k.acc[t] = []VecVirtual{r}
		} else {
			VMOVUPS(r, stack.Offset(64*t))
		}
	})
	if f.biased == 0 {
		k.nothing = k.zero()
	}
	Label("block")
	for u := range f.units {
		k.twice(w, u, stack)
		for g := range w {
			fetch.prefetch(g, w[g], u*f.bytes*16/f.units, (u+1)*f.bytes*16/f.units)
		}
	}
	ADDQ(U32(uint32(f.units*tokens*32)), k.q)
	ADDQ(U32(uint32(f.units*tokens*4)), k.d)
	ADDQ(U32(uint32(f.units*tokens*4)), k.s)
	for g := range w {
		ADDQ(U32(uint32(f.bytes*16)), w[g])
	}
	DECQ(blocks)
	JNZ(LabelRef("block"))
	results(tokens, []int{0, 2}, k.vectors, func(t, g int, m Mem) {
		if g == 0 {
			VMOVUPS(k.acc[t][0], m)
		} else {
			VMOVUPS(k.load(stack.Offset(64*t)), m)
		}
	})
	VZEROUPPER()
	RET()
	return name
}

// twice adds 32 columns of two groups.
func (k *kernel) twice(w [2]Register, u int, stack Mem) {
	sums := make([][2]VecVirtual, k.tokens)
	for t := range sums {
		for g := range w {
			if k.f.biased == 0 {
				sums[t][g] = k.load(k.nothing)
			} else {
				sums[t][g] = ZMM()
				VPBROADCASTD(k.sum(u, t, 0), sums[t][g])
			}
		}
	}
	for j := range 8 {
		var quads [2]VecVirtual
		for g := range w {
			k.w = w[g]
			quads[g] = k.f.quad(&k.context, u, j)
		}
		for t := range sums {
			b := ZMM()
			VPBROADCASTD(k.activation(u, t, j), b)
			for g := range w {
				VPDPBUSD(b, quads[g], sums[t][g])
			}
		}
	}
	for g := range w {
		k.w = w[g]
		scale := k.f.scale(&k.context, u, 0)
		var offset VecVirtual
		if k.f.offset != nil {
			offset = k.f.offset(&k.context, u, 0)
		}
		for t := range sums {
			k.mul(scale, k.float(sums[t][g]))
			var acc VecVirtual
			if g == 0 {
				acc = k.acc[t][0]
			} else {
				acc = k.load(stack.Offset(64 * t))
			}
			VFMADD231PS_BCST(k.step(u, t), sums[t][g], acc)
			k.addOffset(u, t, 0, offset, acc)
			if g != 0 {
				VMOVUPS(acc, stack.Offset(64*t))
			}
		}
	}
}
