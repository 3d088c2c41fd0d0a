package quant

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// A stat is what is known of the inputs of some tensors.
type stat struct {
	cols   int
	tokens int
	square []float64 // sum of x*x for each input
	abs    []float64 // sum of |x| for each input
	// products is the sum of x*xT, [cols][cols]; nil unless GPTQ needs it. It has the
	// model's activations in it alone, no text.
	products []float32
}

// maxProducts bounds the memory of all products, in bytes.
const maxProducts = 8 << 30

// collect runs the model over the calibration text and sums up its activations.
func collect(ctx context.Context, pool *tensor.Pool, products bool, activations Activations) (map[string]*stat, error) {
	stats := map[string]*stat{}
	var failed error
	used := 0
	err := activations(ctx, func(name string, x []float32, cols int) {
		if failed != nil || len(x) == 0 {
			return
		}
		s := stats[name]
		if s == nil {
			s = &stat{cols: cols, square: make([]float64, cols), abs: make([]float64, cols)}
			stats[name] = s
			if products {
				if used += 4 * cols * cols; used > maxProducts {
					failed = fmt.Errorf("calibrating all layers at once needs more than %d GB of memory", maxProducts>>30)
					return
				}
				s.products = make([]float32, cols*cols)
			}
		}
		failed = s.add(pool, x, cols)
	})
	if err = errors.Join(err, failed); err != nil {
		return nil, err
	}
	if len(stats) == 0 {
		return nil, errors.New("the calibration text is empty")
	}
	return stats, nil
}

// add sums up tokens, x being [tokens][cols].
func (s *stat) add(pool *tensor.Pool, x []float32, cols int) error {
	if cols != s.cols {
		return fmt.Errorf("activations of %d and of %d numbers for one tensor", s.cols, cols)
	}
	n := len(x) / cols
	s.tokens += n
	for i, v := range x {
		f := float64(v)
		if math.IsNaN(f) || math.IsInf(f, 0) {
			return errors.New("an activation is not a number")
		}
		s.square[i%cols] += f * f
		s.abs[i%cols] += math.Abs(f)
	}
	if s.products == nil {
		return nil
	}
	across := make([]float32, len(x)) // transposed: a product of rows with each other
	for t := range n {
		for c := range cols {
			across[c*n+t] = x[t*cols+c]
		}
	}
	return addProduct(pool, s.products, cols, across, across, n)
}

// importance returns the mean square of each input.
func (s *stat) importance() []float32 {
	out := make([]float32, s.cols)
	for i, v := range s.square {
		out[i] = float32(v/float64(s.tokens)) + 1e-12 // what is never seen counts a little
	}
	return out
}
