package hf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// bitsAt returns a number of bits that begins at a bit of packed words; it may lie
// across two of them.
func bitsAt(words []uint32, stride, at, bits int) int {
	w, shift := at/32, at%32
	v := uint64(words[w*stride]) >> shift
	if shift+bits > 32 {
		v |= uint64(words[(w+1)*stride]) << (32 - shift)
	}
	return int(v & (1<<bits - 1))
}

// gptq: codes are packed along the inputs, qweight [in*bits/32][out]; zeros along the
// outputs, qzeros [groups][out*bits/32]; scales [groups][out]. The first version of
// the format stores zeros less one, the second does not; files of the second often
// say that they are of the first.
func (s *source) gptq(q *quantisation) *layout {
	bits := q.Bits
	if bits != 2 && bits != 3 && bits != 4 && bits != 8 {
		s.err = fmt.Errorf("%w: GPTQ of %d bits", errors.ErrUnsupported, bits)
		return nil
	}
	packed, out := s.shape("qweight", "I32")
	in := packed * 32 / bits
	groups, _ := s.shape("scales", floatTypes...)
	s.expect("scales", groups, out, floatTypes...)
	s.expect("qzeros", groups, (out*bits+31)/32, "I32")
	if s.err == nil && (packed*32%bits != 0 || in%groups != 0) {
		s.err = fmt.Errorf("%d inputs in %d groups", in, groups)
	}
	l := &layout{part: "qweight", rows: out, cols: in, group: max(1, in/groups)}
	scales, zeros := s.floats("scales"), s.words("qzeros")
	if _, ok := s.has("g_idx"); ok {
		l.groupOf = s.order(in, l.group, groups)
	}
	if s.err != nil {
		return nil
	}
	width := (out*bits + 31) / 32
	stored := func(r, g int) int { return bitsAt(zeros[g*width:(g+1)*width], 1, r*bits, bits) }
	less := 1
	middle := 1 << (bits - 1)
	if q.Checkpoint == "gptq_v2" || q.Symmetric != nil && *q.Symmetric && stored(0, 0) == middle {
		less = 0
	}
	l.scale = func(r, g int) float32 { return scales[g*out+r] }
	l.zero = func(r, g int) int { return stored(r, g) + less }
	l.codes = func() (func(r, c int) int, error) {
		words := s.words("qweight")
		return func(r, c int) int { return bitsAt(words[r:], out, c*bits, bits) }, s.err
	}
	l.choose(bits)
	return l
}

// order reads which group each column belongs to; nil if they lie in order.
func (s *source) order(cols, group, groups int) []int32 {
	words := s.words("g_idx")
	if s.err == nil && len(words) != cols {
		s.err = fmt.Errorf("g_idx is for %d columns, not %d", len(words), cols)
	}
	if s.err != nil {
		return nil
	}
	out := make([]int32, cols)
	inOrder := true
	for i, w := range words {
		if w >= uint32(groups) {
			s.err = fmt.Errorf("g_idx names group %d of %d", w, groups)
			return nil
		}
		out[i] = int32(w)
		inOrder = inOrder && int(w) == i/group
	}
	if inOrder {
		return nil
	}
	return out
}

// awqPlace is where in a word AWQ puts each of eight numbers.
var awqPlace = [8]int{0, 4, 1, 5, 2, 6, 3, 7}

// awq: codes are packed along the outputs, qweight [in][out/8], in an order of its own;
// zeros likewise, qzeros [groups][out/8]; scales [groups][out].
func (s *source) awq() *layout {
	in, packed := s.shape("qweight", "I32")
	out := packed * 8
	groups, _ := s.shape("scales", floatTypes...)
	s.expect("scales", groups, out, floatTypes...)
	s.expect("qzeros", groups, packed, "I32")
	if s.err == nil && in%groups != 0 {
		s.err = fmt.Errorf("%d inputs in %d groups", in, groups)
	}
	scales, zeros := s.floats("scales"), s.words("qzeros")
	if s.err != nil {
		return nil
	}
	nibble := func(words []uint32, row, col int) int {
		return int(words[row*packed+col/8] >> (4 * awqPlace[col%8]) & 15)
	}
	l := &layout{part: "qweight", rows: out, cols: in, group: in / groups}
	l.scale = func(r, g int) float32 { return scales[g*out+r] }
	l.zero = func(r, g int) int { return nibble(zeros, g, r) }
	l.codes = func() (func(r, c int) int, error) {
		words := s.words("qweight")
		return func(r, c int) int { return nibble(words, c, r) }, s.err
	}
	l.choose(4)
	return l
}

// compressed: codes are packed along the inputs of each output, weight_packed
// [out][in*bits/32]; weight_scale [out][groups]; zeros, if there are any, packed along
// the outputs, weight_zero_point [out*bits/32][groups]. Both are stored with the middle
// added.
func (s *source) compressed() *layout {
	out, packed := s.shape("weight_packed", "I32")
	shape, ok := s.has("weight_shape")
	if s.err == nil && (!ok || shape.DType != "I64" && shape.DType != "I32" || shape.Elements() != 2) {
		s.err = errors.New("weight_shape is missing")
	}
	words := s.words("weight_shape")
	if s.err != nil {
		return nil
	}
	in := int(words[1])
	if shape.DType == "I64" {
		in = int(words[2])
	}
	bits := 0
	for _, b := range []int{4, 8} {
		if (in*b+31)/32 == packed {
			bits = b
		}
	}
	_, groups := s.shape("weight_scale", floatTypes...)
	s.expect("weight_scale", out, groups, floatTypes...)
	if s.err == nil && (bits == 0 || in < 1 || in%groups != 0) {
		s.err = fmt.Errorf("%w: %d inputs in %d words and %d groups", errors.ErrUnsupported, in, packed, groups)
	}
	l := &layout{part: "weight_packed", rows: out, cols: in, group: max(1, in/groups)}
	scales := s.floats("weight_scale")
	if _, ok := s.has("weight_g_idx"); ok {
		s.err = errors.Join(s.err, fmt.Errorf("%w: reordered columns of compressed-tensors", errors.ErrUnsupported))
	}
	l.scale = func(r, g int) float32 { return scales[r*groups+g] }
	l.zero = func(r, g int) int { return 1 << (bits - 1) }
	if _, ok := s.has("weight_zero_point"); ok && s.err == nil {
		s.expect("weight_zero_point", (out*bits+31)/32, groups, "I32")
		zeros := s.words("weight_zero_point")
		l.zero = func(r, g int) int { return bitsAt(zeros[g:], groups, r*bits, bits) }
	}
	if s.err != nil {
		return nil
	}
	l.codes = func() (func(r, c int) int, error) {
		words := s.words("weight_packed")
		return func(r, c int) int { return bitsAt(words[r*packed:(r+1)*packed], 1, c*bits, bits) }, s.err
	}
	l.choose(bits)
	return l
}

// eight: signed bytes with a scale for each row, weight [out][in], weight_scale [out][1].
func (s *source) eight() *layout {
	out, in := s.shape("weight", "I8")
	s.expect("weight_scale", out, 1, floatTypes...)
	scales := s.floats("weight_scale")
	if s.err != nil {
		return nil
	}
	l := &layout{part: "weight", rows: out, cols: in, group: in}
	l.scale = func(r, _ int) float32 { return scales[r] }
	l.zero = func(int, int) int { return 128 }
	l.codes = func() (func(r, c int) int, error) {
		raw, err := s.folder.Read(s.prefix + ".weight")
		return func(r, c int) int { return int(int8(raw[r*in+c])) + 128 }, err
	}
	l.choose(8)
	return l
}

// small: 8-bit floats with a scale for all, for each row, or for each block of both
// dimensions.
func (s *source) small(scale string) *layout {
	out, in := s.shape("weight", "F8_E4M3", "F8_E5M2")
	t, _ := s.has(scale)
	rows, cols := 1, 1
	switch len(t.Shape) {
	case 0:
	case 1:
		rows = int(t.Shape[0])
	case 2:
		rows, cols = int(t.Shape[0]), int(t.Shape[1])
	default:
		s.err = errors.Join(s.err, fmt.Errorf("%s has the shape %v", scale, t.Shape))
	}
	if s.err == nil && (rows < 1 || cols < 1 || rows > out || cols > in) {
		s.err = fmt.Errorf("%s has the shape %v for %d x %d weights", scale, t.Shape, out, in)
	}
	scales := s.floats(scale)
	if s.err != nil {
		return nil
	}
	// Blocks have the same size but for the last.
	high, wide := (out+rows-1)/rows, (in+cols-1)/cols
	if rows > 1 && cols > 1 {
		high, wide = powerOfTwo(high), powerOfTwo(wide)
	}
	factor := func(r, c int) float32 { return scales[min(r/high, rows-1)*cols+min(c/wide, cols-1)] }
	weight, _ := s.has("weight")
	typ := tensor.F8_E4M3
	if weight.DType == "F8_E5M2" {
		typ = tensor.F8_E5M2
	}
	l := &layout{part: "weight", typ: typ, rows: out, cols: in, group: in}
	if block := typ.BlockLen(); in%block == 0 && (cols == 1 || wide%block == 0) {
		l.blocks = func() ([]byte, error) { return s.eights(typ, in, factor) }
		return l
	}
	l.typ = tensor.BF16 // numbers in a block have other scales
	l.values = func() (func(r, c int) float32, error) {
		values := s.floats("weight")
		return func(r, c int) float32 { return values[r*in+c] * factor(r, c) }, s.err
	}
	return l
}

// eights returns the weights, rows of cols 8-bit floats, as blocks that hold the same numbers.
func (s *source) eights(typ tensor.Type, cols int, scale func(r, c int) float32) ([]byte, error) {
	raw, err := s.folder.Read(s.prefix + ".weight")
	if err != nil {
		return nil, err
	}
	block := typ.BlockLen()
	out := make([]byte, 0, typ.Bytes(len(raw)))
	values := make([]float32, block)
	for at := 0; at < len(raw); at += block {
		from := len(out)
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(scale(at/cols, at%cols)))
		out = append(out, raw[at:at+block]...)
		if err := tensor.Dequantise(values, typ, out[from:]); err != nil {
			return nil, err
		}
		for _, v := range values {
			if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
				return nil, errors.New("a weight is not a number")
			}
		}
	}
	return out, nil
}

// powerOfTwo rounds up.
func powerOfTwo(n int) int {
	p := 1
	for p < n {
		p *= 2
	}
	return p
}
