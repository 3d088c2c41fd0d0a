package hf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/atoll-run/atoll/llm/safetensors"
	"github.com/atoll-run/atoll/tensor"
)

// A quantisation is what a config.json says of how weights are stored.
type quantisation struct {
	Method     string `json:"quant_method"`
	Bits       int    `json:"bits"`
	Symmetric  *bool  `json:"sym"`
	Checkpoint string `json:"checkpoint_format"`
	Version    string `json:"version"`
}

// A layout is a matrix that somebody has quantised: whole numbers, each group of a
// row with a scale and a zero, or small floats with scales. weight = (code - zero) * scale.
type layout struct {
	part       string // the tensor that stands for all of it
	typ        tensor.Type
	rows, cols int
	group      int // columns that share a scale and a zero

	scale func(row, group int) float32
	zero  func(row, group int) int
	// codes reads the weights, as whole numbers, values as floats, and blocks as they
	// are written; two of them are nil. What they return is only kept while a tensor is
	// written.
	codes  func() (func(row, col int) int, error)
	values func() (func(row, col int) float32, error)
	blocks func() ([]byte, error)
	// groupOf tells the group of a column where columns were reordered; nil: they lie
	// in order.
	groupOf []int32
}

// source reads the tensors of one module, and remembers what went wrong.
type source struct {
	folder *safetensors.Folder
	prefix string
	err    error
}

// has returns what a tensor of the module is.
func (s *source) has(name string) (safetensors.Tensor, bool) {
	return s.folder.Tensor(s.prefix + "." + name)
}

// shape returns the two dimensions of a matrix of a type.
func (s *source) shape(name string, types ...safetensors.DType) (rows, cols int) {
	t, ok := s.has(name)
	if s.err == nil && (!ok || len(t.Shape) != 2 || !slices.Contains(types, t.DType) || t.Shape[0] < 1 || t.Shape[1] < 1 || t.Size > 1<<40) {
		s.err = fmt.Errorf("%s is missing or not a matrix of %v", name, types)
	}
	if s.err != nil {
		return 1, 1
	}
	return int(t.Shape[0]), int(t.Shape[1])
}

// expect fails unless a matrix has this shape.
func (s *source) expect(name string, rows, cols int, types ...safetensors.DType) {
	if r, c := s.shape(name, types...); s.err == nil && (r != rows || c != cols) {
		s.err = fmt.Errorf("%s is %d x %d, not %d x %d", name, r, c, rows, cols)
	}
}

// words reads whole numbers of 32 bits; bits that are packed together need their signs
// as little as these.
func (s *source) words(name string) []uint32 {
	if s.err != nil {
		return nil
	}
	raw, err := s.folder.Read(s.prefix + "." + name)
	if err != nil {
		s.err = err
		return nil
	}
	out := make([]uint32, len(raw)/4)
	for i := range out {
		out[i] = binary.LittleEndian.Uint32(raw[4*i:])
	}
	return out
}

func (s *source) floats(name string) []float32 {
	t, _ := s.has(name)
	if s.err != nil {
		return nil
	}
	raw, err := s.folder.Read(s.prefix + "." + name)
	if err == nil {
		var out []float32
		if out, err = safetensors.Floats(t.DType, raw); err == nil {
			return out
		}
	}
	s.err = err
	return nil
}

// floatTypes are what scales come in.
var floatTypes = []safetensors.DType{"F16", "BF16", "F32"}

// layoutOf recognises how a module is stored; nil if it is not quantised.
func (q *quantisation) layoutOf(folder *safetensors.Folder, prefix string) (*layout, error) {
	if q == nil {
		return nil, nil
	}
	s := &source{folder: folder, prefix: prefix}
	weight, plain := s.has("weight")
	_, scaled := s.has("weight_scale")
	_, inverse := s.has("weight_scale_inv")
	_, packed := s.has("weight_packed")
	_, zeros := s.has("qzeros")
	var l *layout
	switch {
	case packed:
		l = s.compressed()
	case zeros && q.Method == "gptq":
		l = s.gptq(q)
	case zeros && q.Method == "awq":
		if q.Bits != 4 || q.Version != "" && q.Version != "gemm" {
			return nil, fmt.Errorf("%w: AWQ of %d bits, version %q", errors.ErrUnsupported, q.Bits, q.Version)
		}
		l = s.awq()
	case plain && weight.DType == "I8" && scaled:
		l = s.eight()
	case plain && (weight.DType == "F8_E4M3" || weight.DType == "F8_E5M2") && scaled:
		l = s.small("weight_scale")
	case plain && (weight.DType == "F8_E4M3" || weight.DType == "F8_E5M2") && inverse:
		l = s.small("weight_scale_inv")
	default:
		return nil, nil
	}
	if s.err != nil {
		return nil, s.err
	}
	return l, nil
}

// choose picks the blocks that hold the same numbers: with the zero in the middle Q3_0,
// Q4_0 and Q8_0, else Q3_1 and Q4_1. What fits none becomes 16-bit floats.
func (l *layout) choose(bits int) {
	middle := true
	for r := 0; r < l.rows && middle; r++ {
		for g := 0; g*l.group < l.cols && middle; g++ {
			middle = l.zero(r, g) == 1<<(bits-1)
		}
	}
	blocks := l.groupOf == nil && l.group%32 == 0 && l.cols%32 == 0
	switch {
	case blocks && bits == 3 && middle:
		l.typ = tensor.Q3_0
	case blocks && bits == 3:
		l.typ = tensor.Q3_1
	case blocks && bits == 4 && middle:
		l.typ = tensor.Q4_0
	case blocks && bits == 4:
		l.typ = tensor.Q4_1
	case blocks && bits == 8 && middle:
		l.typ = tensor.Q8_0
	default:
		l.typ = tensor.F16
	}
}

// encode returns the rows in the layout's type.
func (l *layout) encode() ([]byte, error) {
	if l.blocks != nil {
		return l.blocks()
	}
	if l.values != nil {
		value, err := l.values()
		if err != nil {
			return nil, err
		}
		return l.floats(value)
	}
	code, err := l.codes()
	if err != nil {
		return nil, err
	}
	if l.typ == tensor.F16 {
		return l.floats(func(r, c int) float32 {
			g := c / l.group
			if l.groupOf != nil {
				g = int(l.groupOf[c])
			}
			return float32(code(r, c)-l.zero(r, g)) * l.scale(r, g)
		})
	}
	out := make([]byte, 0, l.typ.Bytes(l.rows*l.cols))
	for r := range l.rows {
		for c := 0; c < l.cols; c += 32 {
			g := c / l.group
			scale := l.scale(r, g)
			if out, err = l.half(out, scale); err != nil {
				return nil, err
			}
			if l.typ == tensor.Q8_0 {
				for i := range 32 {
					out = append(out, byte(int8(code(r, c+i)-128)))
				}
				continue
			}
			if l.typ == tensor.Q4_1 || l.typ == tensor.Q3_1 {
				if out, err = l.half(out, -scale*float32(l.zero(r, g))); err != nil {
					return nil, err
				}
			}
			if l.typ == tensor.Q3_0 || l.typ == tensor.Q3_1 {
				var threes [12]byte
				tensor.PutThrees(threes[:], func(i int) byte { return byte(code(r, c+i)) })
				out = append(out, threes[:]...)
				continue
			}
			for i := range 16 {
				out = append(out, byte(code(r, c+i)|code(r, c+i+16)<<4))
			}
		}
	}
	return out, nil
}

// half appends a number in 16 bits, and refuses one that they cannot hold.
func (l *layout) half(out []byte, f float32) ([]byte, error) {
	h := tensor.ToF16(f)
	if v := tensor.FromF16(h); math.IsInf(float64(v), 0) || v != v {
		return nil, fmt.Errorf("a scale of %v does not fit 16 bits", f)
	}
	return binary.LittleEndian.AppendUint16(out, h), nil
}

func (l *layout) floats(value func(r, c int) float32) ([]byte, error) {
	row := make([]float32, l.cols)
	size := l.typ.Bytes(l.cols)
	out := make([]byte, size*l.rows)
	for r := range l.rows {
		for c := range row {
			row[c] = value(r, c)
			if math.IsNaN(float64(row[c])) {
				return nil, errors.New("a weight is not a number")
			}
		}
		if err := tensor.Quantise(out[r*size:(r+1)*size], l.typ, row); err != nil {
			return nil, err
		}
	}
	return out, nil
}
