package main

import (
	"fmt"
	"math"
)

// neonColumns is the bytes of a column of 16 rows.
var neonColumns = map[string]int{"F32": 64, "F16": 32, "BF16": 32, "Int8": 16, "Int4": 8}

// A neonCols is a kernel for a type that is not quantised: 16 rows times float activations of some tokens. R0 and R1 are
// results and their stride in bytes, R2 weights, R3 activations and R4 their stride, R6 columns, R14 as in neonKernel.
type neonCols struct {
	*neon
	f        string
	tokens   int
	quarters int           // of a pass
	acc      [][][]quad128 // [chain][token][quarter]
}

// chains is how many sums are kept of their own, to hide that each waits for the one before.
func (c *neonCols) chains() int { return max(1, 2/c.tokens) }

// neonCol writes the kernel of a type. It returns the name.
func neonCol(file *neonFile, f string, tokens int) string {
	name := fmt.Sprintf("cols%sNEONx%d", f, tokens)
	c := &neonCols{neon: file.kernel(name, false), f: f, tokens: tokens}
	c.quarters = 4
	if tokens > 1 {
		c.quarters = 2
	}
	c.op("MOVD $0, R14")
	c.label("pass")
	c.begin()
	if e := eightOf(f); e != nil {
		c.blocks(e)
	} else {
		c.columns()
	}
	c.fold(c.acc)
	c.results(tokens, c.quarters, func(t, h, offset int) { c.store(c.acc[0][t][h], "R7", offset) })
	c.nextPass(c.quarters)
	c.end("(dst *float32, stride int, w *byte, x *float32, xstride int, cols, ahead int)", 56,
		fmt.Sprintf("adds the products of 16 packed rows of %s with %d token(s), xstride floats apart.", f, tokens))
	return name
}

func eightOf(f string) *eight {
	for i := range eights {
		if eights[i].name == f {
			return &eights[i]
		}
	}
	return nil
}

func (c *neonCols) begin() {
	for _, arg := range []string{"dst+0(FP), R0", "stride+8(FP), R1", "w+16(FP), R2", "x+24(FP), R3", "xstride+32(FP), R4", "cols+40(FP), R6"} {
		c.op("MOVD %s", arg)
	}
	c.op("LSL $2, R1")
	c.op("LSL $2, R4")
	c.op("ADD R14, R0")
	if size, ok := neonColumns[c.f]; ok { // the share of a pass
		shift := map[int]int{64: 0, 32: 1, 16: 2, 8: 2}[size]
		if c.f == "BF16" {
			shift = 0
		}
		c.op("ADD R14>>%d, R2", shift)
	}
	for t := 1; t < c.tokens; t++ { // R9 to R11: the other tokens' activations
		c.op("ADD R4, R%d, R%d", map[bool]int{true: 3, false: 7 + t}[t == 1], 8+t)
	}
	c.acc = c.sums(c.chains())
	c.results(c.tokens, c.quarters, func(t, h, offset int) { c.op("FMOVQ %d(R7), F%d", offset, c.acc[0][t][h]) })
	c.zero(c.acc[1:])
}

// sums takes registers.
func (c *neonCols) sums(chains int) [][][]quad128 {
	s := make([][][]quad128, chains)
	for i := range s {
		s[i] = make([][]quad128, c.tokens)
		for t := range s[i] {
			for range c.quarters {
				s[i][t] = append(s[i][t], c.alloc())
			}
		}
	}
	return s
}

func (c *neonCols) each(s [][][]quad128, f func(i, t, h int, r quad128)) {
	for i := range s {
		for t := range s[i] {
			for h, r := range s[i][t] {
				f(i, t, h, r)
			}
		}
	}
}

func (c *neonCols) zero(s [][][]quad128) {
	c.each(s, func(_, _, _ int, r quad128) { c.do(iEOR, r, r, r) })
}

// fold adds all chains to the first.
func (c *neonCols) fold(s [][][]quad128) {
	c.each(s[1:], func(_, t, h int, r quad128) {
		c.do(iFADD, s[0][t][h], s[0][t][h], r)
		c.drop(r)
	})
}

// activations loads as many columns of each token and goes on.
func (c *neonCols) activations(columns int) []quad128 {
	x := make([]quad128, c.tokens)
	for t := range x {
		base := "R3"
		if t > 0 {
			base = fmt.Sprint("R", 8+t)
		}
		x[t] = c.load(words(columns), base, 0)
		c.op("ADD $%d, %s", 4*columns, base)
	}
	return x
}

// columns is the loop over four columns, and then over as few as there may be.
func (c *neonCols) columns() {
	least, size := 1, neonColumns[c.f]
	if c.f == "BF16" || c.f == "Int4" {
		least = 2
	}
	step := func(n int) {
		x := c.activations(n)
		for at := 0; at < n; at += least {
			c.column(at, x)
		}
		c.drop(x...)
		c.op("ADD $%d, R2", size*n)
		c.op("SUBS $%d, R6", n)
	}
	c.op("SUBS $4, R6")
	c.op("BLT few")
	c.label("four")
	step(4)
	c.op("BGE four")
	c.label("few")
	c.op("ADDS $4, R6")
	c.op("BLE end")
	c.label("last")
	step(least)
	c.op("BGT last")
	c.label("end")
}

// column adds one column, or the two that a lane of BF16 or a byte of Int4 holds.
func (c *neonCols) column(at int, x []quad128) {
	for i, vecs := range c.weights(at) {
		for h, w := range vecs {
			for t := range c.tokens {
				c.fmla(c.acc[(at+i)%len(c.acc)][t][h], w, x[t], at+i)
			}
			c.drop(w)
		}
	}
}

// weights loads a column, or two, as floats of four rows each.
func (c *neonCols) weights(at int) [][]quad128 {
	n, offset := c.quarters, at*neonColumns[c.f]
	switch c.f {
	case "F32":
		var v []quad128
		for q := range c.quarters {
			v = append(v, c.load(16, "R2", offset+16*q))
		}
		return [][]quad128{v}
	case "F16":
		var v []quad128
		for q := 0; q < n; q += 2 {
			v = append(v, c.halves(c.load(16, "R2", offset+8*q))...)
		}
		return [][]quad128{v}
	case "BF16":
		var even, odd []quad128
		for q := range c.quarters {
			r, e := c.load(16, "R2", offset+16*q), c.alloc()
			c.shl(32, e, r, 16)
			c.do(iAND, r, r, c.lanes(0xffff0000))
			even, odd = append(even, e), append(odd, r)
		}
		return [][]quad128{even, odd}
	case "Int8":
		r := c.load(4*n, "R2", offset)
		return [][]quad128{c.integers(r, n)}
	}
	r := c.load(4*n, "R2", offset)
	high := c.alloc()
	c.ushr(8, high, r, 4)
	c.do(iAND, r, r, c.bytes(15))
	return [][]quad128{c.normal(r, n), c.normal(high, n)}
}

// halves makes two registers of one of F16.
func (c *neonCols) halves(r quad128) []quad128 {
	high := c.alloc()
	c.one(iFCVTL2, high, r)
	c.one(iFCVTL, r, r)
	return []quad128{r, high}
}

// integers makes floats of signed bytes.
func (c *neonCols) integers(r quad128, n int) []quad128 {
	var v []quad128
	pairs := []quad128{r}
	if n > 2 {
		pairs = append(pairs, c.alloc())
		c.one(iSSHLLB2, pairs[1], r)
	}
	c.one(iSSHLLB, r, r)
	for _, p := range pairs {
		high := c.alloc()
		c.one(iSSHLLH2, high, p)
		c.one(iSSHLLH, p, p)
		for _, f := range []quad128{p, high} {
			c.one(iSCVTF, f, f)
			v = append(v, f)
		}
	}
	return v
}

// normal looks up what Int4's nibbles stand for: byte by byte, then put together.
func (c *neonCols) normal(r quad128, n int) []quad128 {
	var planes [4]quad128
	for i := range planes {
		var words [4]uint32
		for j := range 16 {
			m := math.Float32bits(magnitudes[j%8])
			if j >= 8 {
				m |= 1 << 31
			}
			words[j/4] |= m >> (8 * i) & 255 << (8 * (j % 4))
		}
		planes[i] = c.alloc()
		c.tbl(planes[i], c.table(fmt.Sprint("Gauss", i), words), r)
	}
	c.drop(r)
	var v []quad128
	zips := []instruction{iZIP1B, iZIP2B}
	for _, z := range zips[:n/2] {
		low, high := c.alloc(), c.alloc()
		c.do(z, low, planes[0], planes[1])
		c.do(z, high, planes[2], planes[3])
		second := c.alloc()
		c.do(iZIP2H, second, low, high)
		c.do(iZIP1H, low, low, high)
		c.drop(high)
		v = append(v, low, second)
	}
	c.drop(planes[:]...)
	return v
}

// blocks is the loop over blocks of 64 columns of 8-bit floats.
func (c *neonCols) blocks(e *eight) {
	c.op("ADD R14>>2, R2, R8") // of the numbers, R2 of the scales
	c.op("ADD $%d, R8", eightScales)
	c.op("ADD R14, R2")
	c.label("block")
	c.op("MOVD $%d, R12", eightColumns/4)
	sums := c.sums(1)
	c.zero(sums)
	c.label("inner")
	x := c.activations(4)
	for at := range 4 {
		for h, w := range c.eight(e, at) {
			for t := range c.tokens {
				c.fmla(sums[0][t][h], w, x[t], at)
			}
			c.drop(w)
		}
	}
	c.drop(x...)
	c.op("ADD $64, R8")
	c.op("SUBS $1, R12")
	c.op("BNE inner")
	for h := range c.quarters {
		scale := c.load(16, "R2", 16*h)
		if e.factor != 1 {
			c.do(iFMUL, scale, scale, c.lanes(math.Float32bits(float32(e.factor))))
		}
		for t := range c.tokens {
			c.do(iFMLA, c.acc[0][t][h], sums[0][t][h], scale)
		}
		c.drop(scale)
	}
	c.each(sums, func(_, _, _ int, r quad128) { c.drop(r) })
	c.op("ADD $%d, R2", eightBytes)
	c.op("ADD $%d, R8", eightScales)
	c.op("SUBS $%d, R6", eightColumns)
	c.op("BGT block")
}

// eight loads a column of 8-bit floats, as halves that a factor makes good; see eight.column.
func (c *neonCols) eight(e *eight, at int) []quad128 {
	n := c.quarters
	r := c.load(4*n, "R8", 16*at)
	half := func(d quad128, wide, signed instruction) quad128 {
		if e.factor == 1 {
			c.one(wide, d, r)
			return d
		}
		c.one(signed, d, r)
		c.shl(16, d, d, 7)
		c.do(iAND, d, d, c.lanes(0xbfffbfff)) // the sign stands twice
		return d
	}
	var v []quad128
	if n > 2 {
		v = c.halves(half(c.alloc(), iSHLLB2, iSSHLLB2))
	}
	return append(c.halves(half(r, iSHLLB, iSSHLLB)), v...)
}
