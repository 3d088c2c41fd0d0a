package tensor

import "math"

// RMSNorm writes x, [n][len(weight)], with each row divided by its root mean square and multiplied by weight. dst may be x.
func RMSNorm(dst, x, weight []float32, eps float32) {
	n := len(weight)
	for ; len(x) > 0; dst, x = dst[n:], x[n:] {
		mean := squares(best, x[:n]) / float32(n)
		scaledMul(best, dst[:n], x[:n], weight, float32(1/math.Sqrt(float64(mean+eps))))
	}
}

// Add adds x to dst.
func Add(dst, x []float32) { add(best, dst[:len(x)], x) }

// Scale multiplies x by f.
func Scale(x []float32, f float32) { scale(best, x, f) }

// SiLUMul writes gate * sigmoid(gate) * up. dst may be either.
func SiLUMul(dst, gate, up []float32) { siluMul(best, dst[:len(gate)], gate, up[:len(gate)]) }

// GELUMul writes gelu(gate) * up with the tanh approximation of GELU. dst may be either.
func GELUMul(dst, gate, up []float32) { geluMul(best, dst[:len(gate)], gate, up[:len(gate)]) }

// Softcap bends x so that it stays within -limit to limit.
func Softcap(x []float32, limit float32) {
	for i, v := range x {
		x[i] = limit * float32(math.Tanh(float64(v/limit)))
	}
}

// Softmax replaces x by exp(x) over its sum.
func Softmax(x []float32) {
	sum := expSum(best, x, largest(best, x))
	scale(best, x, 1/sum)
}

// Angles writes the rotations of position pos for RoPE: len(freq) cosines, then as many sines, each times magnitude (1 unless
// the scaling method says otherwise). freq holds the angle in radians by which each pair turns from one position to the next,
// after any scaling for long contexts.
func Angles(dst, freq []float32, pos int, magnitude float32) {
	for i, f := range freq {
		sin, cos := math.Sincos(float64(pos) * float64(f))
		dst[i], dst[len(freq)+i] = float32(cos)*magnitude, float32(sin)*magnitude
	}
}

// RotateHalves turns each head of x, [heads][headDim], by Angles: number i pairs with number i+n, n the number of angles (the
// layout of GPT-NeoX and of Hugging Face's files). Numbers from 2n on stay.
func RotateHalves(x []float32, headDim int, angles []float32) {
	n := len(angles) / 2
	cos, sin := angles[:n], angles[n:]
	for ; len(x) > 0; x = x[headDim:] {
		a, b := x[:n], x[n:2*n]
		for i, c := range cos {
			s, u, v := sin[i], a[i], b[i]
			a[i], b[i] = u*c-v*s, u*s+v*c
		}
	}
}

// RotatePairs is RotateHalves for the other layout: number 2i pairs with number 2i+1 (GPT-J, and Llama's GGUF files).
func RotatePairs(x []float32, headDim int, angles []float32) {
	n := len(angles) / 2
	cos, sin := angles[:n], angles[n:]
	for ; len(x) > 0; x = x[headDim:] {
		for i, c := range cos {
			s, u, v := sin[i], x[2*i], x[2*i+1]
			x[2*i], x[2*i+1] = u*c-v*s, u*s+v*c
		}
	}
}
