//go:build !amd64 && !arm64

package tensor

// There are no vectors here: the reference does all.

const best = Scalar

// Best returns the fastest ISA of this machine.
func Best() ISA { return best }

func roundRow(_ ISA, q []int8, d []float32, halves []int32, x []float32, step int) {
	roundScalar(q, d, halves, x, step)
}

func (p *Pool) tiled(*Input) []Range { return nil }

func (in *Input) split(*Pool, Type) {}

func (p *Pool) multiply(d *Product, in *Input, lo, hi int) { multiplyScalar(d, in, lo, hi) }

func addCols(_ ISA, dst []float32, stride int, w Matrix, x []float32, xstride, tokens, _ int) {
	addColsScalar(dst, stride, w, x, xstride, tokens)
}

func squares(_ ISA, x []float32) float32              { return squaresScalar(x) }
func scaledMul(_ ISA, dst, x, y []float32, f float32) { scaledMulScalar(dst, x, y, f) }
func add(_ ISA, dst, x []float32)                     { addScalar(dst, x) }
func scale(_ ISA, x []float32, f float32)             { scaleScalar(x, f) }
func siluMul(_ ISA, dst, gate, up []float32)          { siluMulScalar(dst, gate, up) }
func geluMul(_ ISA, dst, gate, up []float32)          { geluMulScalar(dst, gate, up) }
func largest(_ ISA, x []float32) float32              { return largestScalar(x) }
func expSum(_ ISA, x []float32, top float32) float32  { return expSumScalar(x, top) }

func dotHalf(_ ISA, h []byte, x []float32) float32 { return dotHalfScalar(h, x) }
func mulHalf(_ ISA, x []float32, h []byte)         { mulHalfScalar(x, h) }

func sweep(_ ISA, b []byte) uint64 { return sweepScalar(b) }
