package safetensors

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// Floats returns numbers that are stored as floating point, in float32. It fails for
// other types.
func Floats(t DType, raw []byte) ([]float32, error) {
	size := sizes[t]
	if size == 0 || int64(len(raw))%size != 0 {
		return nil, fmt.Errorf("%d bytes of %s", len(raw), t)
	}
	out := make([]float32, int64(len(raw))/size)
	switch t {
	case "F32":
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		}
	case "F16":
		for i := range out {
			out[i] = tensor.FromF16(binary.LittleEndian.Uint16(raw[2*i:]))
		}
	case "BF16":
		for i := range out {
			out[i] = tensor.FromBF16(binary.LittleEndian.Uint16(raw[2*i:]))
		}
	case "F64":
		for i := range out {
			out[i] = float32(math.Float64frombits(binary.LittleEndian.Uint64(raw[8*i:])))
		}
	case "F8_E4M3":
		for i, b := range raw {
			out[i] = tensor.FromE4M3(b)
		}
	case "F8_E5M2":
		for i, b := range raw {
			out[i] = tensor.FromE5M2(b)
		}
	default:
		return nil, fmt.Errorf("%s is not floating point", t)
	}
	return out, nil
}
