//go:build amd64 || arm64

package tensor

// Vectors do what they can of a row, eight numbers at a time, and the reference does the rest.

func vectored(isa ISA, n int) int {
	if isa == Scalar {
		return 0
	}
	return n &^ 7
}

func squares(isa ISA, x []float32) (sum float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		sum = squaresVector(&x[0], n)
	}
	return sum + squaresScalar(x[n:])
}

func scaledMul(isa ISA, dst, x, y []float32, f float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		scaledMulVector(&dst[0], &x[0], &y[0], n, f)
	}
	scaledMulScalar(dst[n:], x[n:], y[n:], f)
}

func add(isa ISA, dst, x []float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		addVector(&dst[0], &x[0], n)
	}
	addScalar(dst[n:], x[n:])
}

func scale(isa ISA, x []float32, f float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		scaleVector(&x[0], n, f)
	}
	scaleScalar(x[n:], f)
}

func siluMul(isa ISA, dst, gate, up []float32) {
	n := vectored(isa, len(gate))
	if n > 0 {
		siluMulVector(&dst[0], &gate[0], &up[0], n)
	}
	siluMulScalar(dst[n:], gate[n:], up[n:])
}

func geluMul(isa ISA, dst, gate, up []float32) {
	n := vectored(isa, len(gate))
	if n > 0 {
		geluMulVector(&dst[0], &gate[0], &up[0], n)
	}
	geluMulScalar(dst[n:], gate[n:], up[n:])
}

func largest(isa ISA, x []float32) float32 {
	n := vectored(isa, len(x))
	top := largestScalar(x[n:])
	if n > 0 {
		top = max(top, maxVector(&x[0], n))
	}
	return top
}

func expSum(isa ISA, x []float32, top float32) (sum float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		sum = expSumVector(&x[0], n, top)
	}
	return sum + expSumScalar(x[n:], top)
}

func dotHalf(isa ISA, h []byte, x []float32) (sum float32) {
	n := vectored(isa, len(x))
	if n > 0 {
		sum = dotHalfVector(&x[0], n, &h[0])
	}
	return sum + dotHalfScalar(h[2*n:], x[n:])
}

func mulHalf(isa ISA, x []float32, h []byte) {
	n := vectored(isa, len(x))
	if n > 0 {
		mulHalfVector(&x[0], n, &h[0])
	}
	mulHalfScalar(x[n:], h[2*n:])
}

// sweep reads b, whose length is a multiple of 256.
func sweep(isa ISA, b []byte) uint64 {
	if isa == Scalar || len(b) == 0 {
		return sweepScalar(b)
	}
	return sweepVector(&b[0], len(b))
}
