package quant

import (
	"errors"

	"github.com/atoll-run/atoll/tensor"
)

// rtn rounds each weight for itself. With importance, the scales of groups are fitted
// by it.
func (f *Format) rtn(pool *tensor.Pool, w []float32, cols int, importance []float32) ([]byte, error) {
	rows := len(w) / cols
	size := f.Type.Bytes(cols)
	out := make([]byte, rows*size)
	failed := make([]error, rows)
	pool.Run(rows, 4, func(lo, hi int) {
		for r := lo; r < hi; r++ {
			failed[r] = f.row(out[r*size:(r+1)*size], w[r*cols:(r+1)*cols], importance)
		}
	})
	return out, errors.Join(failed...)
}

func (f *Format) row(dst []byte, row, importance []float32) error {
	if f.round == nil {
		return tensor.Quantise(dst, f.Type, row)
	}
	codes, size := make([]uint8, f.group), f.Type.BlockBytes()
	for from := 0; from < len(row); from += f.group {
		var weight []float32
		if importance != nil {
			weight = importance[from : from+f.group]
		}
		s := f.fit(row[from:from+f.group], weight)
		for i := range codes {
			codes[i] = uint8(f.round(s, row[from+i]))
		}
		f.pack(dst[:size], s, codes)
		dst = dst[size:]
	}
	return nil
}
