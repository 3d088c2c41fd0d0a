package tensor

import "math"

// What follows is the scalar reference for what is done to rows of numbers.

func exp(x float32) float32 { return float32(math.Exp(float64(x))) }

func squaresScalar(x []float32) (sum float32) {
	for _, v := range x {
		sum += v * v
	}
	return sum
}

func scaledMulScalar(dst, x, y []float32, f float32) {
	for i, v := range x {
		dst[i] = v * f * y[i]
	}
}

func addScalar(dst, x []float32) {
	for i, v := range x {
		dst[i] += v
	}
}

func scaleScalar(x []float32, f float32) {
	for i := range x {
		x[i] *= f
	}
}

func siluMulScalar(dst, gate, up []float32) {
	for i, g := range gate {
		dst[i] = g / (1 + exp(-g)) * up[i]
	}
}

func geluMulScalar(dst, gate, up []float32) {
	for i, g := range gate { // (1+tanh(y))/2 is 1/(1+exp(-2y))
		dst[i] = g / (1 + exp(-2*0.7978845608*(g+0.044715*g*g*g))) * up[i]
	}
}

func largestScalar(x []float32) float32 {
	top := float32(math.Inf(-1))
	for _, v := range x {
		top = max(top, v)
	}
	return top
}

// expSumScalar replaces x by its exponential relative to top, and returns the sum.
func expSumScalar(x []float32, top float32) (sum float32) {
	for i, v := range x {
		x[i] = exp(v - top)
		sum += x[i]
	}
	return sum
}
