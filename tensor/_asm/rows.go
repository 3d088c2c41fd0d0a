package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// What is done to rows of floats needs 256 bits only: it is bound by other things than arithmetic.

func float(name string, f float64) Mem { return all(name, math.Float32bits(float32(f))) }

// round writes the kernel that rounds activations to int8.
func round() {
	TEXT("roundVector", NOSPLIT, "func(q *int8, d *float32, sums *int32, x *float32, blocks, step int)")
	Pragma("noescape")
	Doc("roundVector rounds blocks of 32 numbers to int8. A block's bytes go to q, 32*step after the last one's; its scale to d, step",
		"floats on; the sums of its halves to sums, 2*step on.")
	q, d, sums := Load(Param("q"), GP64()), Load(Param("d"), GP64()), Load(Param("sums"), GP64())
	x, n, step4 := Load(Param("x"), GP64()), Load(Param("blocks"), GP64()), Load(Param("step"), GP64())
	step8, step32 := GP64(), GP64()
	SHLQ(Imm(2), step4)
	LEAQ(Mem{Base: step4, Index: step4, Scale: 1}, step8)
	MOVQ(step4, step32)
	SHLQ(Imm(3), step32)
	Label("block")
	var v [4]VecVirtual
	top := YMM()
	for i := range v {
		v[i] = YMM()
		VMOVUPS(Mem{Base: x, Disp: 32 * i}, v[i])
		if i == 0 {
			VANDPS(all("abs", 0x7fffffff), v[i], top)
			continue
		}
		a := YMM()
		VANDPS(all("abs", 0x7fffffff), v[i], a)
		VMAXPS(a, top, top)
	}
	across(top, VMAXPS)
	scale, inv, some := YMM(), YMM(), YMM()
	VDIVPS(float("steps", 127), top, scale)
	VMOVSS(scale.AsX(), Mem{Base: d})
	VMOVUPS(float("one", 1), inv)
	VDIVPS(scale, inv, inv)
	VCMPPS(Imm(13), float("least", 0x1p-126), scale, some) // at least: below, 1/scale may be infinite
	VANDPS(some, inv, inv)
	for i := range v {
		VMULPS(inv, v[i], v[i])
		VCVTPS2DQ(v[i], v[i])
	}
	for half := range 2 {
		s := YMM()
		VPADDD(v[2*half], v[2*half+1], s)
		across(s, VPADDD)
		VMOVD(s.AsX(), Mem{Base: sums, Disp: 4 * half})
	}
	VPACKSSDW(v[1], v[0], v[0])
	VPACKSSDW(v[3], v[2], v[2])
	VPACKSSWB(v[2], v[0], v[0])
	order := YMM()
	VMOVDQU(all("order", 0, 4, 1, 5, 2, 6, 3, 7), order)
	VPERMD(v[0], order, v[0])
	VMOVDQU(v[0], Mem{Base: q})
	ADDQ(Imm(128), x)
	ADDQ(step32, q)
	ADDQ(step4, d)
	ADDQ(step8, sums)
	DECQ(n)
	JNZ(LabelRef("block"))
	VZEROUPPER()
	RET()
}

// across combines the eight lanes of r, so that each has the result.
func across(r VecVirtual, op func(...Op)) {
	t := YMM()
	VPERM2F128(Imm(1), r, r, t)
	op(t, r, r)
	VPERMILPS(Imm(0x4e), r, t)
	op(t, r, r)
	VPERMILPS(Imm(0xb1), r, t)
	op(t, r, r)
}

// exp replaces r by its exponential. The error is below 2 units in the last place; what would be smaller than normal numbers
// becomes 0, what would be larger than all becomes the largest power of two.
func exp(r VecVirtual) {
	VMINPS(float("expTop", 88.3762626647950), r, r)
	VMAXPS(float("expLow", -87.3365447505531), r, r)
	n, p := YMM(), YMM()
	VMULPS(float("log2e", math.Log2E), r, n)
	VROUNDPS(Imm(0), n, n)
	VFNMADD231PS(float("ln2high", 0.693359375), n, r)
	VFNMADD231PS(float("ln2low", -2.12194440e-4), n, r)
	VMOVUPS(float("exp5", 1.9875691500e-4), p)
	for i, c := range []float64{1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5} {
		VFMADD213PS(float("exp"+string(rune('a'+i)), c), r, p)
	}
	r2 := YMM()
	VMULPS(r, r, r2)
	VFMADD213PS(r, r2, p)
	VADDPS(float("one", 1), p, p)
	VCVTPS2DQ(n, n)
	VPSLLD(Imm(23), n, n)
	VPADDD(n, p, r)
}

// rowLoop emits f for each 8 numbers of rows of n numbers, n a positive multiple of 8.
func rowLoop(n Register, rows []Register, f func()) {
	Label("next")
	f()
	for _, r := range rows {
		ADDQ(Imm(32), r)
	}
	SUBQ(Imm(8), n)
	JG(LabelRef("next"))
}

// expSum writes the kernel of Softmax.
func expSum() {
	TEXT("expSumVector", NOSPLIT, "func(x *float32, n int, top float32) float32")
	Pragma("noescape")
	Doc("expSumVector replaces n numbers, a multiple of 8, by the exponential of what they are above top, and returns their sum.")
	x, n := Load(Param("x"), GP64()), Load(Param("n"), GP64())
	top, sum := YMM(), YMM()
	address, err := Param("top").Resolve()
	if err != nil {
		panic(err)
	}
	VBROADCASTSS(address.Addr, top)
	VXORPS(sum, sum, sum)
	rowLoop(n, []Register{x}, func() {
		v, keep := YMM(), YMM()
		VMOVUPS(Mem{Base: x}, v)
		VSUBPS(top, v, v)
		VCMPPS(Imm(14), float("expLow", -87.3365447505531), v, keep) // greater: minus infinity has weight 0
		exp(v)
		VANDPS(keep, v, v)
		VMOVUPS(v, Mem{Base: x})
		VADDPS(v, sum, sum)
	})
	across(sum, VADDPS)
	Store(sum.AsX(), ReturnIndex(0))
	VZEROUPPER()
	RET()
}

// gated writes the kernels of SiLUMul and GELUMul: gate / (1 + exp(-f(gate))) * up, since (1+tanh(y))/2 = 1/(1+exp(-2y)).
func gated(name, doc string, f func(g VecVirtual) VecVirtual) {
	TEXT(name, NOSPLIT, "func(dst, gate, up *float32, n int)")
	Pragma("noescape")
	Doc(name + " " + doc + " n is a multiple of 8.")
	dst, gate, up, n := Load(Param("dst"), GP64()), Load(Param("gate"), GP64()), Load(Param("up"), GP64()), Load(Param("n"), GP64())
	rowLoop(n, []Register{dst, gate, up}, func() {
		g := YMM()
		VMOVUPS(Mem{Base: gate}, g)
		y := f(g)
		VXORPS(all("sign", 0x80000000), y, y)
		exp(y)
		VADDPS(float("one", 1), y, y)
		VDIVPS(y, g, g)
		VMULPS(Mem{Base: up}, g, g)
		VMOVUPS(g, Mem{Base: dst})
	})
	VZEROUPPER()
	RET()
}

func rows() {
	round()
	expSum()
	gated("siluMulVector", "writes gate * sigmoid(gate) * up.", func(g VecVirtual) VecVirtual {
		y := YMM()
		VMOVUPS(g, y)
		return y
	})
	gated("geluMulVector", "writes gelu(gate) * up.", func(g VecVirtual) VecVirtual {
		y, cube := YMM(), YMM()
		VMULPS(g, g, y)
		VMOVUPS(float("geluLine", 2*math.Sqrt(2/math.Pi)), cube)
		VFMADD132PS(float("geluCube", 2*math.Sqrt(2/math.Pi)*0.044715), cube, y)
		VMULPS(g, y, y)
		return y
	})
	reduced("squaresVector", "the sum of the squares", func(r VecVirtual) { VXORPS(r, r, r) },
		func(v, sum VecVirtual) { VFMADD231PS(v, v, sum) }, VADDPS)
	reduced("maxVector", "the largest", func(r VecVirtual) { VMOVUPS(float("lowest", math.Inf(-1)), r) },
		func(v, sum VecVirtual) { VMAXPS(v, sum, sum) }, VMAXPS)
	normed()
	scaled()
	added()
}

// reduced writes a kernel that folds a row into one number.
func reduced(name, doc string, start func(r VecVirtual), step func(v, sum VecVirtual), op func(...Op)) {
	TEXT(name, NOSPLIT, "func(x *float32, n int) float32")
	Pragma("noescape")
	Doc(name + " returns " + doc + " of n numbers, a multiple of 8.")
	x, n := Load(Param("x"), GP64()), Load(Param("n"), GP64())
	sum := YMM()
	start(sum)
	rowLoop(n, []Register{x}, func() {
		v := YMM()
		VMOVUPS(Mem{Base: x}, v)
		step(v, sum)
	})
	across(sum, op)
	Store(sum.AsX(), ReturnIndex(0))
	VZEROUPPER()
	RET()
}

// normed writes the product of two rows and a number.
func normed() {
	TEXT("scaledMulVector", NOSPLIT, "func(dst, x, y *float32, n int, scale float32)")
	Pragma("noescape")
	Doc("scaledMulVector writes x * y * scale for n numbers, a multiple of 8.")
	dst, x, y, n := Load(Param("dst"), GP64()), Load(Param("x"), GP64()), Load(Param("y"), GP64()), Load(Param("n"), GP64())
	address, err := Param("scale").Resolve()
	if err != nil {
		panic(err)
	}
	s := YMM()
	VBROADCASTSS(address.Addr, s)
	rowLoop(n, []Register{dst, x, y}, func() {
		v := YMM()
		VMULPS(Mem{Base: x}, s, v)
		VMULPS(Mem{Base: y}, v, v)
		VMOVUPS(v, Mem{Base: dst})
	})
	VZEROUPPER()
	RET()
}

// scaled writes the product of a row and a number.
func scaled() {
	TEXT("scaleVector", NOSPLIT, "func(x *float32, n int, f float32)")
	Pragma("noescape")
	Doc("scaleVector multiplies n numbers, a multiple of 8, by f.")
	x, n := Load(Param("x"), GP64()), Load(Param("n"), GP64())
	address, err := Param("f").Resolve()
	if err != nil {
		panic(err)
	}
	f := YMM()
	VBROADCASTSS(address.Addr, f)
	rowLoop(n, []Register{x}, func() {
		v := YMM()
		VMULPS(Mem{Base: x}, f, v)
		VMOVUPS(v, Mem{Base: x})
	})
	VZEROUPPER()
	RET()
}

// added writes the sum of two rows.
func added() {
	TEXT("addVector", NOSPLIT, "func(dst, x *float32, n int)")
	Pragma("noescape")
	Doc("addVector adds n numbers, a multiple of 8.")
	dst, x, n := Load(Param("dst"), GP64()), Load(Param("x"), GP64()), Load(Param("n"), GP64())
	rowLoop(n, []Register{dst, x}, func() {
		v := YMM()
		VMOVUPS(Mem{Base: x}, v)
		VADDPS(Mem{Base: dst}, v, v)
		VMOVUPS(v, Mem{Base: dst})
	})
	VZEROUPPER()
	RET()
}
