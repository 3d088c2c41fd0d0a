package quant

import (
	"encoding/binary"
	"errors"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// damping is what is added to the diagonal of the products, as a part of its mean, so
// that inputs which are nearly alike do not matter too much.
const damping = 0.01

// panel is how many columns of the root are computed at a time.
const panel = 64

// root returns the upper triangular R with H = R RT, [n][n], for the damped mean
// products H of inputs. What is below the diagonal has no meaning.
//
// The error that rounding makes of a row of weights by e is e H eT = |e R|^2. Since R
// is triangular, the number c of e R depends on the errors up to c alone.
func (s *stat) root(pool *tensor.Pool) ([]float32, error) {
	n := s.cols
	r := make([]float32, n*n)
	mean := 0.0
	for i := range n {
		mean += float64(s.products[i*n+i]) / float64(n)
	}
	if !(mean > 0) {
		return nil, errors.New("all activations are zero")
	}
	for i := range n {
		for j := range n {
			r[i*n+j] = float32((float64(s.products[i*n+j]) + float64(s.products[j*n+i])) / (2 * mean))
		}
		r[i*n+i] += damping
	}
	for high := n; high > 0; high -= panel {
		low := max(0, high-panel)
		for c := high - 1; c >= low; c-- {
			line := r[c*n : (c+1)*n]
			d := float64(line[c]) - dot(line[c+1:high], line[c+1:high])
			if !(d > 0) {
				return nil, errors.New("the activations are too much alike")
			}
			line[c] = float32(math.Sqrt(d))
			for i := low; i < c; i++ {
				r[i*n+c] = float32((float64(r[i*n+c]) - dot(r[i*n+c+1:i*n+high], line[c+1:high])) / float64(line[c]))
			}
		}
		pool.Run(low, 16, func(from, to int) {
			for i := from; i < to; i++ {
				for c := high - 1; c >= low; c-- {
					line := r[c*n : (c+1)*n]
					r[i*n+c] = float32((float64(r[i*n+c]) - dot(r[i*n+c+1:i*n+high], line[c+1:high])) / float64(line[c]))
				}
			}
		})
		if low == 0 {
			break
		}
		// What these columns explain of the rest goes.
		width := high - low
		part, less := make([]float32, low*width), make([]float32, low*width)
		for i := range low {
			copy(part[i*width:], r[i*n+low:i*n+high])
		}
		for i, v := range part {
			less[i] = -v
		}
		if err := addProduct(pool, r, n, less, part, width); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// addProduct adds x wT to dst, [tokens][stride]; x is [tokens][width], w is [rows][width].
func addProduct(pool *tensor.Pool, dst []float32, stride int, x, w []float32, width int) error {
	shape := tensor.Shape{Type: tensor.F32, Rows: len(w) / width, Cols: width}
	size, err := shape.Bytes()
	if err != nil {
		return err
	}
	raw := make([]byte, 4*len(w))
	for i, v := range w {
		binary.LittleEndian.PutUint32(raw[4*i:], math.Float32bits(v))
	}
	m, err := tensor.Pack(shape, make([]byte, size), raw)
	if err != nil {
		return err
	}
	var in tensor.Input
	tokens := len(x) / width
	in.Set(x, tokens, width, tensor.Range{To: tokens / 16 * 16})
	pool.MatMul(&in, tensor.Product{W: m, Dst: dst, Stride: stride, Add: true})
	return nil
}

func dot(a, b []float32) float64 {
	var s0, s1, s2, s3 float32
	b = b[:len(a)]
	i := 0
	for ; i+4 <= len(a); i += 4 {
		s0 += a[i] * b[i]
		s1 += a[i+1] * b[i+1]
		s2 += a[i+2] * b[i+2]
		s3 += a[i+3] * b[i+3]
	}
	for ; i < len(a); i++ {
		s0 += a[i] * b[i]
	}
	return float64(s0) + float64(s1) + float64(s2) + float64(s3)
}

// gptq rounds rows of weights, [rows][cols], and returns their blocks. Column by
// column, a weight is rounded from where the errors of those before it, as r weighs
// them, are made up for best.
func (f *Format) gptq(pool *tensor.Pool, w []float32, cols int, r, importance []float32) ([]byte, error) {
	rows, g := len(w)/cols, f.group
	size, block := f.Type.Bytes(cols), f.Type.BlockBytes()
	out := make([]byte, rows*size)
	sums := make([]float32, len(w))   // of errors times r, for each weight
	errs := make([]float32, rows*g)   // of the present group
	across := make([]float32, cols*g) // r of the present group's rows, transposed
	for from := 0; from < cols; from += g {
		to := from + g
		pool.Run(rows, 8, func(lo, hi int) {
			moved, codes := make([]float32, g), make([]uint8, g)
			for row := lo; row < hi; row++ {
				have, sum, e := w[row*cols+from:row*cols+to], sums[row*cols+from:row*cols+to], errs[row*g:(row+1)*g]
				for i := range moved {
					moved[i] = have[i] + sum[i]/r[(from+i)*cols+from+i]
				}
				s := f.fit(moved, importance[from:to])
				for i := range moved {
					line := r[(from+i)*cols+from : (from+i)*cols+to]
					code := f.round(s, have[i]+sum[i]/line[i])
					codes[i] = uint8(code)
					e[i] = have[i] - s.value(code)
					for k := i + 1; k < g; k++ {
						sum[k] += e[i] * line[k]
					}
				}
				f.pack(out[row*size+from/g*block:][:block], s, codes)
			}
		})
		if to == cols {
			break
		}
		rest := across[:(cols-to)*g]
		for c := to; c < cols; c++ {
			for i := range g {
				rest[(c-to)*g+i] = r[(from+i)*cols+c]
			}
		}
		if err := addProduct(pool, sums[to:], cols, errs, rest, g); err != nil {
			return nil, err
		}
	}
	return out, nil
}
