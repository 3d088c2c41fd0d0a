package main

import (
	"fmt"
	"math"
)

// What is done to rows of floats, eight numbers at a time: two registers, so that one need not wait for the other.

type pair [2]quad128

func (n *neon) pair() pair { return pair{n.alloc(), n.alloc()} }

// both emits an instruction for both registers.
func (n *neon) both(i instruction, d, a, b pair) {
	for h := range d {
		n.do(i, d[h], a[h], b[h])
	}
}

func (n *neon) both1(i instruction, d, a pair) {
	for h := range d {
		n.one(i, d[h], a[h])
	}
}

// all is a constant in both registers; it is given back as others are.
func (n *neon) all(f float64) pair {
	r := n.alloc()
	n.float(r, float32(f))
	return pair{r, r}
}

func (n *neon) dropPair(ps ...pair) {
	for _, p := range ps {
		n.drop(p[:]...)
	}
}

func (n *neon) pairAt(base string) pair { return pair{n.load(16, base, 0), n.load(16, base, 16)} }

func (n *neon) storePair(p pair, base string) {
	n.store(p[0], base, 0)
	n.store(p[1], base, 16)
}

// rowLoop emits f for each 8 numbers of rows, whose addresses are in R0 and on.
func (n *neon) rowLoop(rows int, count string, f func()) {
	n.label("next")
	f()
	for r := range rows {
		n.op("ADD $32, R%d", r)
	}
	n.op("SUBS $8, %s", count)
	n.op("BGT next")
}

// across combines eight lanes; every lane of the first register then has the result.
func (n *neon) across(p pair, op instruction, pairwise bool) {
	n.do(op, p[0], p[0], p[1])
	if !pairwise {
		n.one(iFMAXV, p[0], p[0])
		return
	}
	n.do(iFADDP, p[0], p[0], p[0])
	n.do(iFADDP, p[0], p[0], p[0])
}

// exp replaces r by its exponential, as amd64's does.
func (n *neon) exp(r pair) {
	limit := n.all(88.3762626647950)
	n.both(iFMIN, r, r, limit)
	n.drop(limit[0])
	limit = n.all(-87.3365447505531)
	n.both(iFMAX, r, r, limit)
	n.drop(limit[0])
	k, p, q := n.pair(), n.pair(), n.pair()
	c := n.all(math.Log2E)
	n.both(iFMUL, k, r, c)
	n.both1(iFRINTN, k, k)
	for _, part := range []float64{0.693359375, -2.12194440e-4} {
		n.float(c[0], float32(part))
		n.both(iFMLS, r, k, c)
	}
	for h := range p {
		n.float(p[h], 1.9875691500e-4)
	}
	for _, next := range []float64{1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5} {
		for h := range q {
			n.float(q[h], float32(next))
		}
		n.both(iFMLA, q, p, r)
		p, q = q, p
	}
	n.both(iFMUL, q, r, r)
	n.both(iFMLA, r, p, q)
	n.float(c[0], 1)
	n.both(iFADD, r, r, c)
	n.both1(iFCVTNS, k, k)
	for h := range k {
		n.shl(32, k[h], k[h], 23)
	}
	n.both(iADD, r, r, k)
	n.dropPair(k, p, q)
	n.drop(c[0])
}

// args loads pointers and numbers of 8 bytes into R0 and on.
func (n *neon) args(names ...string) {
	for i, name := range names {
		n.op("MOVD %s+%d(FP), R%d", name, 8*i, i)
	}
}

// number loads a float argument into all lanes.
func (n *neon) number(name string, at int) pair {
	r := n.alloc()
	n.op("FMOVS %s+%d(FP), F%d", name, at, r)
	n.dup(r, r, 0)
	return pair{r, r}
}

func neonRows(f *neonFile) {
	neonRound(f)
	n := f.kernel("expSumVector", false)
	n.args("x", "n")
	top, sum := n.number("top", 16), n.pair()
	n.both(iEOR, sum, sum, sum)
	n.rowLoop(1, "R1", func() {
		v, keep, low := n.pairAt("R0"), n.pair(), n.all(-87.3365447505531)
		n.both(iFSUB, v, v, top)
		n.both(iFCMGT, keep, v, low) // minus infinity has weight 0
		n.exp(v)
		n.both(iAND, v, v, keep)
		n.storePair(v, "R0")
		n.both(iFADD, sum, sum, v)
		n.dropPair(v, keep)
		n.drop(low[0])
	})
	n.across(sum, iFADD, true)
	n.op("FMOVS F%d, ret+24(FP)", sum[0])
	n.end("(x *float32, n int, top float32) float32", 28, "replaces n numbers, a multiple of 8, by the exponential of what they are above top, and returns their sum.")

	neonGated(f, "siluMulVector", "writes gate * sigmoid(gate) * up.", func(n *neon, g pair) pair {
		y := n.pair()
		n.both1(iFNEG, y, g)
		return y
	})
	neonGated(f, "geluMulVector", "writes gelu(gate) * up.", func(n *neon, g pair) pair {
		y, square := n.pair(), n.pair()
		n.both(iFMUL, square, g, g)
		line, cube := n.all(-2*math.Sqrt(2/math.Pi)), n.all(-2*math.Sqrt(2/math.Pi)*0.044715)
		for h := range y {
			n.copy(y[h], line[h])
		}
		n.both(iFMLA, y, square, cube)
		n.both(iFMUL, y, y, g)
		n.dropPair(square)
		n.drop(line[0], cube[0])
		return y
	})
	neonReduced(f, "squaresVector", "the sum of the squares", 0, iFMLA, iFADD)
	neonReduced(f, "maxVector", "the largest", math.Inf(-1), iFMAX, iFMAX)
	neonPlainRows(f)
	neonHalves(f)
	neonSweep(f)
}

func neonGated(f *neonFile, name, doc string, negated func(n *neon, g pair) pair) {
	n := f.kernel(name, false)
	n.args("dst", "gate", "up", "n")
	n.rowLoop(3, "R3", func() {
		g, up := n.pairAt("R1"), n.pairAt("R2")
		y, one := negated(n, g), n.all(1)
		n.exp(y)
		n.both(iFADD, y, y, one)
		n.both(iFDIV, g, g, y)
		n.both(iFMUL, g, g, up)
		n.storePair(g, "R0")
		n.dropPair(g, up, y)
		n.drop(one[0])
	})
	n.end("(dst, gate, up *float32, n int)", 32, doc+" n is a multiple of 8.")
}

// neonReduced writes a kernel that folds a row into one number.
func neonReduced(f *neonFile, name, doc string, start float64, step, last instruction) {
	n := f.kernel(name, false)
	n.args("x", "n")
	sum := n.pair()
	for _, r := range sum {
		n.float(r, float32(start))
	}
	n.rowLoop(1, "R1", func() {
		v := n.pairAt("R0")
		if step == iFMLA {
			n.both(step, sum, v, v)
		} else {
			n.both(step, sum, sum, v)
		}
		n.dropPair(v)
	})
	n.across(sum, last, last == iFADD)
	n.op("FMOVS F%d, ret+16(FP)", sum[0])
	n.end("(x *float32, n int) float32", 20, fmt.Sprintf("returns %s of n numbers, a multiple of 8.", doc))
}

func neonPlainRows(f *neonFile) {
	n := f.kernel("scaledMulVector", false)
	n.args("dst", "x", "y", "n")
	s := n.number("scale", 32)
	n.rowLoop(3, "R3", func() {
		x, y := n.pairAt("R1"), n.pairAt("R2")
		n.both(iFMUL, x, x, s)
		n.both(iFMUL, x, x, y)
		n.storePair(x, "R0")
		n.dropPair(x, y)
	})
	n.end("(dst, x, y *float32, n int, scale float32)", 36, "writes x * y * scale for n numbers, a multiple of 8.")

	n = f.kernel("scaleVector", false)
	n.args("x", "n")
	s = n.number("f", 16)
	n.rowLoop(1, "R1", func() {
		x := n.pairAt("R0")
		n.both(iFMUL, x, x, s)
		n.storePair(x, "R0")
		n.dropPair(x)
	})
	n.end("(x *float32, n int, f float32)", 20, "multiplies n numbers, a multiple of 8, by f.")

	n = f.kernel("addVector", false)
	n.args("dst", "x", "n")
	n.rowLoop(2, "R2", func() {
		d, x := n.pairAt("R0"), n.pairAt("R1")
		n.both(iFADD, d, d, x)
		n.storePair(d, "R0")
		n.dropPair(d, x)
	})
	n.end("(dst, x *float32, n int)", 24, "adds n numbers, a multiple of 8.")
}

// neonHalves writes the kernels on rows of F16.
func neonHalves(f *neonFile) {
	widened := func(n *neon) pair {
		h := pair{n.load(16, "R2", 0), n.alloc()}
		n.one(iFCVTL2, h[1], h[0])
		n.one(iFCVTL, h[0], h[0])
		n.op("ADD $16, R2")
		return h
	}
	n := f.kernel("dotHalfVector", false)
	n.args("x", "n", "h")
	sum := n.pair()
	n.both(iEOR, sum, sum, sum)
	n.rowLoop(1, "R1", func() {
		x, h := n.pairAt("R0"), widened(n)
		n.both(iFMLA, sum, x, h)
		n.dropPair(x, h)
	})
	n.across(sum, iFADD, true)
	n.op("FMOVS F%d, ret+24(FP)", sum[0])
	n.end("(x *float32, n int, h *byte) float32", 28, "multiplies n numbers, a multiple of 8, with as many in F16.")

	n = f.kernel("mulHalfVector", false)
	n.args("x", "n", "h")
	n.rowLoop(1, "R1", func() {
		x, h := n.pairAt("R0"), widened(n)
		n.both(iFMUL, x, x, h)
		n.storePair(x, "R0")
		n.dropPair(x, h)
	})
	n.end("(x *float32, n int, h *byte)", 24, "multiplies n numbers, a multiple of 8, by as many in F16.")
}

// neonRound writes the kernel that rounds activations to int8.
func neonRound(f *neonFile) {
	n := f.kernel("roundVector", false)
	n.args("q", "d", "sums", "x", "blocks", "step")
	n.op("LSL $2, R5, R6")
	n.op("LSL $3, R5, R7")
	n.op("LSL $5, R5, R8")
	n.label("block")
	var v [8]quad128
	for i := range v {
		v[i] = n.load(16, "R3", 16*i)
	}
	top, a := n.alloc(), n.alloc()
	n.one(iFABS, top, v[0])
	for _, r := range v[1:] {
		n.one(iFABS, a, r)
		n.do(iFMAX, top, top, a)
	}
	n.one(iFMAXV, top, top)
	n.float(a, 127)
	n.do(iFDIV, top, top, a)
	n.op("FMOVS F%d, (R1)", top)
	inv := n.alloc()
	n.float(a, 0x1p-126)
	n.do(iFCMGE, a, top, a) // at least: below, 1/scale may be infinite
	n.float(inv, 1)
	n.do(iFDIV, inv, inv, top)
	n.do(iAND, inv, inv, a)
	n.dup(inv, inv, 0)
	for _, r := range v {
		n.do(iFMUL, r, r, inv)
		n.one(iFCVTNS, r, r)
	}
	for half := range 2 {
		s := v[4*half : 4*half+4]
		n.do(iADD, top, s[0], s[1])
		n.do(iADD, a, s[2], s[3])
		n.do(iADD, top, top, a)
		n.one(iADDV, top, top)
		n.op("FMOVS F%d, %d(R2)", top, 4*half)
	}
	for i := 0; i < 8; i += 2 {
		n.one(iXTNH, v[i], v[i])
		n.one(iXTN2H, v[i], v[i+1])
	}
	for i := 0; i < 8; i += 4 {
		n.one(iXTNB, v[i], v[i])
		n.one(iXTN2B, v[i], v[i+2])
		n.store(v[i], "R0", 4*i)
	}
	n.op("ADD $128, R3")
	n.op("ADD R8, R0")
	n.op("ADD R6, R1")
	n.op("ADD R7, R2")
	n.op("SUBS $1, R4")
	n.op("BNE block")
	n.end("(q *int8, d *float32, sums *int32, x *float32, blocks, step int)", 48,
		"rounds blocks of 32 numbers to int8. A block's bytes go to q, 32*step after the last one's; its scale to d, step",
		"floats on; the sums of its halves to sums, 2*step on.")
}

// neonSweep reads memory as fast as can be.
func neonSweep(f *neonFile) {
	n := f.kernel("sweepVector", false)
	n.args("p", "n")
	acc := [4]quad128{n.alloc(), n.alloc(), n.alloc(), n.alloc()}
	for _, a := range acc {
		n.do(iEOR, a, a, a)
	}
	n.label("loop")
	for i := range 16 {
		r := n.load(16, "R0", 16*i)
		n.do(iORR, acc[i%4], acc[i%4], r)
		n.drop(r)
	}
	n.op("ADD $256, R0")
	n.op("SUBS $256, R1")
	n.op("BNE loop")
	for _, a := range acc[1:] {
		n.do(iORR, acc[0], acc[0], a)
	}
	n.op("FMOVD F%d, ret+16(FP)", acc[0])
	n.end("(p *byte, n int) uint64", 24, "reads n bytes, a multiple of 256, and returns some of the bits that it read.")
}
