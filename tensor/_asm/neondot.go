package main

import "fmt"

// A neonKernel is one function being written: 16 rows of quantised weights times int8 activations of some tokens.
// R0 and R1 are results and their stride in bytes, R2 weights, R3 activations, R4 their scales, R5 their sums, R6 blocks, R8
// weights where each row has 2 bytes and R14 how far into the 64 bytes of 16 rows the pass is.
type neonKernel struct {
	*neon
	f       format
	parts   neonFormat
	tokens  int
	quarter int // of the pass: the four rows being taken apart
}

// neonTokens are the numbers of tokens that there are kernels for; 32 registers do not hold more sums.
var neonTokens = []int{1, 4}

// quarters is how many of the 16 rows' are computed together, pass by pass. One token's weights are read once, in order.
func (k *neonKernel) quarters() int {
	switch {
	case k.tokens == 1:
		return 4
	case k.dotprod:
		return 2
	}
	return 1
}

func neonISA(dotprod bool) string {
	if dotprod {
		return "DotProd"
	}
	return "NEON"
}

// neonDot writes the kernel of a format, which is as those of amd64. It returns the name.
func neonDot(file *neonFile, f format, dotprod bool, tokens int) string {
	name := fmt.Sprintf("dot%s%sx%d", f.name, neonISA(dotprod), tokens)
	k := &neonKernel{neon: file.kernel(name, dotprod), f: f, parts: neonFormats[f.name], tokens: tokens}
	quarters := k.quarters()
	k.op("MOVD $0, R14")
	k.label("pass")
	for r, arg := range []string{"dst+0", "stride+8", "w+16", "q+24", "d+32", "s+40", "blocks+48"} {
		k.op("MOVD %s(FP), R%d", arg, r)
	}
	k.op("LSL $2, R1")
	k.op("ADD R14, R0")
	k.op("ADD R14>>1, R2, R8")
	k.op("ADD R14, R2")
	acc := make([][]quad128, tokens)
	k.results(tokens, quarters, func(t, _, offset int) { acc[t] = append(acc[t], k.load(16, "R7", offset)) })
	k.label("block")
	for u := range f.units {
		k.unit(u, quarters, acc)
	}
	k.op("ADD $%d, R3", f.units*tokens*32)
	k.op("ADD $%d, R4", f.units*tokens*4)
	k.op("ADD $%d, R5", f.units*tokens*4*f.parts)
	k.op("ADD $%d, R2", f.bytes*16)
	k.op("ADD $%d, R8", f.bytes*16)
	k.op("SUBS $1, R6")
	k.op("BNE block")
	k.results(tokens, quarters, func(t, h, offset int) { k.store(acc[t][h], "R7", offset) })
	k.nextPass(quarters)
	k.end("(dst *float32, stride int, w *byte, q *int8, d *float32, s *uint32, blocks, ahead int)", 64,
		fmt.Sprintf("adds the products of 16 packed rows of %s with %d token(s).", f.name, tokens))
	return name
}

// results visits where the sums of each token and quarter of a pass come from and go to.
func (n *neon) results(tokens, quarters int, visit func(t, h, offset int)) {
	n.op("MOVD R0, R7")
	for t := range tokens {
		for h := range quarters {
			visit(t, h, 16*h)
		}
		if t < tokens-1 {
			n.op("ADD R1, R7")
		}
	}
}

// nextPass goes on to the next rows of the 16.
func (n *neon) nextPass(quarters int) {
	if quarters == 4 {
		return
	}
	n.op("ADD $%d, R14", 16*quarters)
	n.op("CMP $64, R14")
	n.op("BLT pass")
}

// words is the size of a load.
func words(n int) int { return 4 * n }

// unit adds 32 columns.
func (k *neonKernel) unit(u int, quarters int, acc [][]quad128) {
	d := k.load(words(k.tokens), "R4", u*k.tokens*4)
	for part := range k.f.parts {
		sums := k.integers(u, part, quarters)
		for h := range quarters {
			k.quarter = h
			scale := k.parts.scale(k, u, part)
			for t := range k.tokens {
				s := sums[t][h]
				k.one(iSCVTF, s, s)
				k.do(iFMUL, s, s, scale)
				k.fmla(acc[t][h], s, d, t)
				k.drop(s)
			}
			k.drop(scale)
		}
		if k.parts.offset == nil {
			continue
		}
		s := k.sums(u)
		for h := range quarters {
			k.quarter = h
			offset := k.parts.offset(k, u, part)
			for t := range k.tokens {
				at := t*k.f.parts + part
				if k.f.below {
					k.fmls(acc[t][h], offset, s[at/4], at%4)
				} else {
					k.fmla(acc[t][h], offset, s[at/4], at%4)
				}
			}
			k.drop(offset)
		}
		k.drop(s...)
	}
	k.drop(d)
}

// sums loads the sums of a unit's activations: a word for each token and part.
func (k *neonKernel) sums(u int) []quad128 {
	n, at := k.tokens*k.f.parts, u*k.tokens*4*k.f.parts
	s := []quad128{k.load(words(min(n, 4)), "R5", at)}
	if n > 4 {
		s = append(s, k.load(16, "R5", at+16))
	}
	return s
}

// integers sums a part's bytes times the activations of each token, [token][quarter]. They start from what makes good that bytes are
// too large.
func (k *neonKernel) integers(u, part int, quarters int) [][]quad128 {
	sums := make([][]quad128, k.tokens)
	if k.dotprod {
		k.begin(sums, u, part, quarters)
	}
	halves := make([][][2]quad128, k.tokens) // sums of 16 bits: of the first two rows, and of the others
	for t := range halves {
		halves[t] = make([][2]quad128, quarters)
	}
	each := 8 / k.f.parts
	top := min(k.f.top, 128)
	room, n := 32767/(top*127), 0 // products that 16 bits hold, and how many they do
	for four := part * each; four < (part+1)*each; four += 4 {
		x := make([]quad128, k.tokens)
		for t := range x {
			x[t] = k.load(16, "R3", (u*k.tokens+t)*32+4*four)
		}
		for j := four; j < four+4; j++ {
			last := j == (part+1)*each-1
			if k.dotprod {
				for h := range quarters {
					k.quarter = h
					w := k.parts.quad(k, u, j)
					for t := range x {
						k.sdot(sums[t][h], w, x[t], j%4)
					}
					k.drop(w)
				}
				continue
			}
			k.multiply(u, j, quarters, x, halves, n == 0)
			if n++; n == room || last {
				k.widen(sums, halves, u, part)
				n = 0
			}
		}
		k.drop(x...)
	}
	return sums
}

// begin takes registers for the sums.
func (k *neonKernel) begin(sums [][]quad128, u, part, quarters int) {
	var s []quad128
	if k.f.biased != 0 && !k.f.signed() {
		s = k.sums(u)
	}
	for t := range sums {
		for range quarters {
			r := k.alloc()
			sums[t] = append(sums[t], r)
			if s == nil {
				k.do(iEOR, r, r, r)
				continue
			}
			at := t*k.f.parts + part
			k.dup(r, s[at/4], at%4)
		}
	}
	k.drop(s...)
}

// multiply adds products of quad j to sums of 16 bits, or begins those.
func (k *neonKernel) multiply(u, j int, quarters int, x []quad128, halves [][][2]quad128, first bool) {
	low, high := iSMLAL, iSMLAL2
	if first {
		low, high = iSMULL, iSMULL2
	}
	for h := range quarters {
		k.quarter = h
		w := k.parts.quad(k, u, j)
		for t := range x {
			b, r := k.alloc(), &halves[t][h]
			k.dup(b, x[t], j%4)
			if first {
				r[0], r[1] = k.alloc(), k.alloc()
			}
			k.do(low, r[0], w, b)
			k.do(high, r[1], w, b)
			k.drop(b)
		}
		k.drop(w)
	}
}

// widen adds sums of 16 bits to those of 32.
func (k *neonKernel) widen(sums [][]quad128, halves [][][2]quad128, u, part int) {
	if sums[0] == nil {
		k.begin(sums, u, part, len(halves[0]))
	}
	for t := range halves {
		for h, r := range halves[t] {
			k.one(iSADDLP, r[0], r[0])
			k.one(iSADDLP, r[1], r[1])
			k.do(iADDP, r[0], r[0], r[1])
			k.do(iADD, sums[t][h], sums[t][h], r[0])
			k.drop(r[:]...)
		}
	}
}
