//go:build !amd64

package tensor

// Best returns the fastest ISA of this machine.
func Best() ISA { return Scalar }

func roundRow(_ ISA, q []int8, d []float32, halves []int32, x []float32, step int) {
	roundScalar(q, d, halves, x, step)
}

func (p *Pool) multiply(d *Product, in *Input, lo, hi int) { multiplyScalar(d, in, lo, hi) }
