package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// A kernel is one function being written: 16 rows of quantised weights times int8 activations of some tokens.
type kernel struct {
	context
	f       format
	tokens  int
	q, d, s Register // activations, their scales, their sums; see tensor.Input
	acc     [][]VecVirtual
	nothing VecVirtual // zeros, for wide vectors
}

// dot writes the kernel of a format. It adds to dst, whose tokens are stride floats apart. ahead is 0 if the weights are near already. It returns the name.
func dot(f format, v vectors, tokens int) string {
	name := fmt.Sprintf("dot%s%sx%d", f.name, v.isa(), tokens)
	TEXT(name, NOSPLIT, "func(dst *float32, stride int, w *byte, q *int8, d *float32, s *uint32, blocks, ahead int)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s adds the products of 16 packed rows of %s with %d token(s).", name, f.name, tokens))
	for i, halves := range v.passes(tokens) {
		k := &kernel{context: context{vectors: v}, f: f, tokens: tokens}
		k.w = Load(Param("w"), GP64())
		k.q, k.d, k.s = Load(Param("q"), GP64()), Load(Param("d"), GP64()), Load(Param("s"), GP64())
		blocks := Load(Param("blocks"), GP64())
		fetch := newFetcher(tokens)
		k.acc = make([][]VecVirtual, tokens)
		results(tokens, halves, v, func(t, h int, m Mem) { k.acc[t] = append(k.acc[t], v.load(m)) })
		if v.wide {
			k.nothing = v.zero()
		}
		label := fmt.Sprintf("block%d", i)
		Label(label)
		for u := range f.units {
			for h, half := range halves {
				k.half = half
				k.unit(u, h)
			}
			// A unit's share at a time: many at once would wait for each other.
			fetch.prefetch(i, k.w, u*f.bytes*16/f.units, (u+1)*f.bytes*16/f.units)
		}
		ADDQ(U32(uint32(f.units*tokens*32)), k.q)
		ADDQ(U32(uint32(f.units*tokens*4)), k.d)
		ADDQ(U32(uint32(f.units*tokens*4*f.parts)), k.s)
		ADDQ(U32(uint32(f.bytes*16)), k.w)
		DECQ(blocks)
		JNZ(LabelRef(label))
		results(tokens, halves, v, func(t, h int, m Mem) { VMOVUPS(k.acc[t][h], m) })
	}
	VZEROUPPER()
	RET()
	return name
}

// results visits where the sums of each token and half come from and go to.
func results(tokens int, halves []int, v vectors, visit func(t, h int, m Mem)) {
	dst, stride := Load(Param("dst"), GP64()), Load(Param("stride"), GP64())
	for t := range tokens {
		for h, half := range halves {
			visit(t, h, Mem{Base: dst, Disp: half * 32})
		}
		if t < tokens-1 {
			LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
		}
	}
}

// prefetch asks for the lines that begin from byte from to byte to on of what is read ahead bytes later: the hardware's own
// prefetching stops at page boundaries.
func prefetch(w Register, ahead Register, from, to int) {
	for line := (from + 63) / 64 * 64; line < to; line += 64 {
		m := Mem{Base: w, Disp: line}
		if ahead == nil {
			m.Disp += prefetchBy
		} else {
			m.Index, m.Scale = ahead, 1
		}
		PREFETCHT0(m)
	}
}

// prefetchBy is how far ahead one token's weights are asked for: nearer, those that are dear to take apart would come too late.
const prefetchBy = 8192

// A fetcher asks for memory as far ahead as the kernel's caller says, or not at all.
type fetcher struct {
	ahead  Register // nil for one token
	labels int
}

func newFetcher(tokens int) *fetcher {
	if tokens == 1 {
		return &fetcher{}
	}
	return &fetcher{ahead: Load(Param("ahead"), GP64())}
}

func (f *fetcher) prefetch(pass int, w Register, from, to int) {
	if f.ahead == nil {
		prefetch(w, nil, from, to)
		return
	}
	f.labels++
	near := fmt.Sprintf("near%d_%d", pass, f.labels)
	TESTQ(f.ahead, f.ahead)
	JZ(LabelRef(near))
	prefetch(w, f.ahead, from, to)
	Label(near)
}

// Where a token's part of a unit lies: tokens are interleaved block by block.
func (k *kernel) activation(u, t, j int) Mem {
	return Mem{Base: k.q, Disp: (u*k.tokens+t)*32 + j*4}
}

func (k *kernel) step(u, t int) Mem { return Mem{Base: k.d, Disp: (u*k.tokens + t) * 4} }

func (k *kernel) sum(u, t, part int) Mem {
	return Mem{Base: k.s, Disp: ((u*k.tokens+t)*k.f.parts + part) * 4}
}

// unit adds 32 columns. h is where the half's sums are.
func (k *kernel) unit(u, h int) {
	if k.wide {
		k.unitWide(u, h)
		return
	}
	for part := range k.f.parts {
		sums := k.integersNarrow(u, part)
		scale := k.f.scale(&k.context, u, part)
		for t, s := range sums {
			k.mul(scale, k.float(s))
			d := YMM()
			VBROADCASTSS(k.step(u, t), d)
			VFMADD231PS(d, s, k.acc[t][h])
		}
		if k.f.offset == nil {
			continue
		}
		offset := k.f.offset(&k.context, u, part)
		for t := range k.tokens {
			s := YMM()
			VBROADCASTSS(k.sum(u, t, part), s)
			if k.f.below {
				VFNMADD231PS(s, offset, k.acc[t][h])
			} else {
				VFMADD231PS(s, offset, k.acc[t][h])
			}
		}
	}
}

// unitWide multiplies four bytes a lane at once, into 32 bits.
func (k *kernel) unitWide(u, h int) {
	var quads [8]VecVirtual
	for j := range quads {
		quads[j] = k.f.quad(&k.context, u, j)
	}
	scale, offset := make([]VecVirtual, k.f.parts), make([]VecVirtual, k.f.parts)
	for part := range scale {
		scale[part] = k.f.scale(&k.context, u, part)
		if k.f.offset != nil {
			offset[part] = k.f.offset(&k.context, u, part)
		}
	}
	each := 8 / k.f.parts
	for t := range k.tokens {
		var sum VecVirtual
		for part := range k.f.parts {
			s := k.integers(u, t, part, quads[part*each:(part+1)*each])
			k.float(s)
			if part == 0 {
				sum = k.mul(scale[0], s)
			} else {
				VFMADD231PS(scale[part], s, sum)
			}
		}
		VFMADD231PS_BCST(k.step(u, t), sum, k.acc[t][h])
		for part := range k.f.parts {
			k.addOffset(u, t, part, offset[part], k.acc[t][h])
		}
	}
}

// addOffset adds to acc what a part's numbers have added, times the sum of a token's activations; offset is nil if nothing.
func (k *kernel) addOffset(u, t, part int, offset, acc VecVirtual) {
	switch {
	case offset == nil:
	case k.f.below:
		VFNMADD231PS_BCST(k.sum(u, t, part), offset, acc)
	default:
		VFMADD231PS_BCST(k.sum(u, t, part), offset, acc)
	}
}

// integers sums quads times a token's activations.
func (k *kernel) integers(u, t, part int, quads []VecVirtual) VecVirtual {
	var s [2]VecVirtual
	if k.f.biased != 0 {
		s[0] = ZMM()
		VPBROADCASTD(k.sum(u, t, part), s[0])
	} else {
		s[0] = k.load(k.nothing)
	}
	chains := 1
	if k.tokens < 4 { // too few tokens to hide that each product waits for the one before
		chains = 2
		s[1] = k.load(k.nothing)
	}
	for j, quad := range quads {
		VPDPBUSD_BCST(k.activation(u, t, part*len(quads)+j), quad, s[j%chains])
	}
	if chains == 2 {
		VPADDD(s[1], s[0], s[0])
	}
	return s[0]
}

// integersNarrow sums a part's bytes times the activations of each token: in 16 bits as long as those hold the sums, and
// then in 32.
func (k *kernel) integersNarrow(u, part int) []VecVirtual {
	sums, words := make([]VecVirtual, k.tokens), make([]VecVirtual, k.tokens)
	each := 8 / k.f.parts
	room := max(1, 32767/(k.f.top*127*2)) // products that 16 bits hold
	for n := range each {
		j := part*each + n
		v := k.f.quad(&k.context, u, j)
		var abs VecVirtual
		if k.f.top > 127 { // made signed; the sign then goes to the other side
			k.xor(bytes(0x80), v)
			abs = YMM()
			VPABSB(v, abs)
		}
		for t := range k.tokens {
			b := YMM()
			VPBROADCASTD(k.activation(u, t, j), b)
			if abs != nil {
				VPSIGNB(v, b, b)
				VPMADDUBSW(b, abs, b)
			} else {
				VPMADDUBSW(b, v, b)
			}
			if words[t] == nil {
				words[t] = b
			} else {
				VPADDW(b, words[t], words[t])
			}
			if n == each-1 || (n+1)%room == 0 {
				sums[t] = k.widen(sums[t], words[t], u, t, part)
				words[t] = nil
			}
		}
	}
	return sums
}

// widen adds 16-bit sums to 32-bit ones, which start from the bias.
func (k *kernel) widen(sum, words VecVirtual, u, t, part int) VecVirtual {
	VPMADDWD(all("ones", 0x00010001), words, words)
	if sum == nil && k.f.biased != 0 && k.f.top <= 127 {
		sum = YMM()
		VPBROADCASTD(k.sum(u, t, part), sum)
	}
	if sum != nil {
		VPADDD(sum, words, words)
	}
	return words
}
