package quant

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/tensor"
)

// A Format is what numbers are rounded to, and the blocks that hold them.
type Format struct {
	Name string
	Type tensor.Type // of the file
	Bits float64     // a weight, in the file, with scales

	// Groups of whole numbers; nil round for formats where every number stands for
	// itself.
	group int
	fit   func(w, importance []float32) scale
	round func(s scale, w float32) int
	pack  func(dst []byte, s scale, codes []uint8)
}

// Calibrated reports whether GPTQ and AWQ are defined for a format.
func (f *Format) Calibrated() bool { return f.round != nil }

// A scale tells the numbers of a group: code * step + low.
type scale struct{ step, low float32 }

func (s scale) value(code int) float32 { return float32(code)*s.step + s.low }

// Formats lists what can be made, from the most bits to the fewest. The 8-bit floats and the 3-bit formats are in blocks of
// our own, which other programs do not read.
var Formats = []Format{
	{Name: "f16", Type: tensor.F16, Bits: 16},
	{Name: "bf16", Type: tensor.BF16, Bits: 16},
	{Name: "f8_e4m3", Type: tensor.F8_E4M3, Bits: 8.5},
	{Name: "f8_e5m2", Type: tensor.F8_E5M2, Bits: 8.5},
	{Name: "q8_0", Type: tensor.Q8_0, Bits: 8.5, group: 32, fit: fitSymmetric(-127, 127), round: nearest(-127, 127), pack: packQ8},
	{Name: "q6_k", Type: tensor.Q6_K, Bits: 6.5625},
	{Name: "q4_k", Type: tensor.Q4_K, Bits: 4.5},
	{Name: "q4_1", Type: tensor.Q4_1, Bits: 5, group: 32, fit: fitRange(15), round: nearest(0, 15), pack: packQ4_1},
	{Name: "q4_0", Type: tensor.Q4_0, Bits: 4.5, group: 32, fit: fitSymmetric(-8, 7), round: nearest(-8, 7), pack: packQ4_0},
	{Name: "q3_1", Type: tensor.Q3_1, Bits: 4, group: 32, fit: fitRange(7), round: nearest(0, 7), pack: packQ3_1},
	{Name: "q3_0", Type: tensor.Q3_0, Bits: 3.5, group: 32, fit: fitSymmetric(-4, 3), round: nearest(-4, 3), pack: packQ3_0},
}

// ParseFormat returns the format of a name.
func ParseFormat(name string) (Format, error) {
	for _, f := range Formats {
		if f.Name == name {
			return f, nil
		}
	}
	return Format{}, fmt.Errorf("format %q is not known", name)
}

func nearest(low, high int) func(scale, float32) int {
	return func(s scale, w float32) int {
		if s.step == 0 {
			return max(low, min(0, high))
		}
		return max(low, min(high, int(math.RoundToEven(float64((w-s.low)/s.step)))))
	}
}

// half rounds to what a 16-bit float holds, since scales are stored as such.
func half(f float32) float32 { return tensor.FromF16(tensor.ToF16(f)) }

// shrinks are by what the widest possible range is narrowed to find the one with the
// least error: cutting off a few numbers may help all others.
var shrinks = []float32{1, 0.93, 0.86, 0.79}

// best returns the candidate with the least error, each number's counting by its
// importance; without importance the first, which is plain rounding.
func best(w, importance []float32, round func(scale, float32) int, candidates func(shrink float32) []scale) scale {
	if importance == nil {
		return candidates(1)[0]
	}
	var chosen scale
	least := math.Inf(1)
	for _, shrink := range shrinks {
		for _, s := range candidates(shrink) {
			sum := 0.0
			for i, v := range w {
				e := float64(s.value(round(s, v)) - v)
				sum += e * e * float64(importance[i])
			}
			if sum < least {
				least, chosen = sum, s
			}
		}
	}
	return chosen
}

// fitSymmetric chooses a step for codes around zero. When there is one more code on
// the negative side, the step may be negative, so that it serves the largest number.
func fitSymmetric(low, high int) func(w, importance []float32) scale {
	round := nearest(low, high)
	return func(w, importance []float32) scale {
		var top float32
		for _, v := range w {
			if float32(math.Abs(float64(v))) > float32(math.Abs(float64(top))) {
				top = v
			}
		}
		return best(w, importance, round, func(shrink float32) []scale {
			s := scale{step: half(top * shrink / float32(low))}
			if importance == nil || low == -high {
				return []scale{s}
			}
			return []scale{s, {step: half(top * shrink / float32(high))}}
		})
	}
}

// fitRange chooses a step and the lowest number for codes from zero up.
func fitRange(high int) func(w, importance []float32) scale {
	round := nearest(0, high)
	return func(w, importance []float32) scale {
		low, top := w[0], w[0]
		for _, v := range w {
			low, top = min(low, v), max(top, v)
		}
		return best(w, importance, round, func(shrink float32) []scale {
			width := (top - low) * shrink
			middle := (top + low) / 2
			return []scale{{step: half(width / float32(high)), low: half(middle - width/2)}}
		})
	}
}

// Codes are kept as they are stored: signed ones with the middle added.

func packQ8(dst []byte, s scale, codes []uint8) {
	binary.LittleEndian.PutUint16(dst, tensor.ToF16(s.step))
	copy(dst[2:], codes)
}

func packQ4_0(dst []byte, s scale, codes []uint8) {
	binary.LittleEndian.PutUint16(dst, tensor.ToF16(s.step))
	for i := range 16 {
		dst[2+i] = (codes[i]+8)&15 | (codes[i+16]+8)<<4
	}
}

func packQ4_1(dst []byte, s scale, codes []uint8) {
	binary.LittleEndian.PutUint16(dst, tensor.ToF16(s.step))
	binary.LittleEndian.PutUint16(dst[2:], tensor.ToF16(s.low))
	for i := range 16 {
		dst[4+i] = codes[i]&15 | codes[i+16]<<4
	}
}

func packQ3_0(dst []byte, s scale, codes []uint8) {
	binary.LittleEndian.PutUint16(dst, tensor.ToF16(s.step))
	tensor.PutThrees(dst[2:], func(i int) byte { return codes[i] + 4 })
}

func packQ3_1(dst []byte, s scale, codes []uint8) {
	binary.LittleEndian.PutUint16(dst, tensor.ToF16(s.step))
	binary.LittleEndian.PutUint16(dst[2:], tensor.ToF16(s.low))
	tensor.PutThrees(dst[4:], func(i int) byte { return codes[i] })
}
