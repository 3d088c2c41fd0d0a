// Package squeeze makes the tensors that shards of a model send each other small, at a loss that is bounded and reported.
//
// A Plan says what is left of the values: all, or those of the largest magnitude (top-k), each as a float, or as an integer
// of 8 or 4 bits in blocks that share a scale. Who sends gradients or other updates that are added up uses a Feedback: what
// one frame lost is part of the next, so that nothing is lost in the sum. Activations, which are not added up, go by
// AppendWithin, which takes the plan that is soonest at the other end without losing more than is allowed.
//
// A frame:
//
//	version (1 byte), form (1), positions (1: 0 all, 1 gaps, 2 bits), largest error of a value (float32),
//	number of values (uvarint); number of those that are kept (uvarint), unless all are;
//	positions: for each kept value the distance to the one before (uvarint), or one bit for each value, the lowest first;
//	scales of the blocks of kept values (bfloat16 each), if the form has them; kept values
//
// Numbers are little endian. Values that are not kept are zero.
package squeeze

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The ways in which values cannot be squeezed, or a frame cannot be opened.
var (
	ErrNotFinite = errors.New("a value is infinite or not a number")
	ErrPlan      = errors.New("there is no such plan")
	ErrCorrupt   = errors.New("the frame is damaged, or is not of this many values")
)

// Form is how a value is written.
type Form byte

// The forms, from the largest.
const (
	F32  Form = iota // 4 bytes, exact
	BF16             // 2 bytes, error at most 1/256 of the value, or 2^-134 where that is more
	Int8             // 1 byte, error at most 1/252 of the largest magnitude among 64 values, or 2^-134
	Int4             // half a byte, error at most 1/13 of the largest magnitude among 32 values, or 2^-134
)

// form describes a Form. Values of those with a block are whole numbers from -top to top, times the scale of the block.
type form struct {
	name  string
	bits  int
	block int // values that share a scale; 0: there are none
	top   float64
}

var forms = [...]form{F32: {"f32", 32, 0, 0}, BF16: {"bf16", 16, 0, 0}, Int8: {"int8", 8, 64, 127}, Int4: {"int4", 4, 32, 7}}

// String returns the form's name.
func (f Form) String() string {
	if int(f) >= len(forms) {
		return fmt.Sprintf("form %d", byte(f))
	}
	return forms[f].name
}

// bytes is what n values and their scales take.
func (f form) bytes(n int) int { return f.scales(n)*2 + (n*f.bits+7)/8 }

func (f form) scales(n int) int {
	if f.block == 0 {
		return 0
	}
	return (n + f.block - 1) / f.block
}

// Plan is how values are squeezed. The zero value keeps all of them, exactly.
type Plan struct {
	Form Form
	Keep float64 // fraction of the values that is kept, those of the largest magnitude; 0 means all
}

// kept is how many of n values a plan keeps, at least one if there is any.
func (p Plan) kept(n int) int {
	if p.Keep == 0 {
		return n
	}
	return int(math.Ceil(p.Keep * float64(n)))
}

// Loss is how far what arrives is from what was sent.
type Loss struct {
	Max      float32 // no value is off by more
	Relative float64 // root of the sum of all squared errors over that of all squared values, 0 to 1
}

const (
	version   = 1
	maxValues = 1 << 30
	headSize  = 7 // bytes before the first uvarint
	kindAt    = 2 // among them: the kind of positions
	maxErrAt  = 3
)

// Kinds of positions.
const (
	everything = iota
	gaps
	bits
)

// Append appends the frame of x to dst. It fails with ErrNotFinite or ErrPlan, and returns dst as it was then.
func Append(dst []byte, x []float32, p Plan) ([]byte, Loss, error) {
	return appendFrame(dst, x, p, make([]float32, len(x)))
}

// appendFrame is Append; lost, as long as x, is set to what the other end will lack.
func appendFrame(dst []byte, x []float32, p Plan, lost []float32) ([]byte, Loss, error) {
	if int(p.Form) >= len(forms) || !(p.Keep >= 0 && p.Keep <= 1) || len(x) > maxValues {
		return dst, Loss{}, ErrPlan
	}
	for _, v := range x {
		if !finite(v) {
			return dst, Loss{}, ErrNotFinite
		}
	}
	out := append(dst, version, byte(p.Form), everything, 0, 0, 0, 0)
	out = binary.AppendUvarint(out, uint64(len(x)))
	kept, kind := x, byte(everything)
	if k := p.kept(len(x)); k < len(x) {
		out = binary.AppendUvarint(out, uint64(k))
		at := largest(x, k)
		out, kind = appendPositions(out, at, len(x))
		kept = make([]float32, k)
		for i, j := range at {
			kept[i] = x[j]
		}
	}
	out = appendValues(out, kept, p.Form)
	frame := out[len(dst):]
	frame[kindAt] = kind

	// What is lost is by definition what the decoder does not return.
	if _, err := Decode(lost, frame); err != nil {
		return dst, Loss{}, err
	}
	l := compare(x, lost)
	binary.LittleEndian.PutUint32(frame[maxErrAt:], math.Float32bits(l.Max))
	return out, l, nil
}

// compare returns the loss, and leaves the difference in got.
func compare(x, got []float32) Loss {
	var worst, all, off float64
	for i, v := range x {
		d := float64(v) - float64(got[i])
		got[i] = float32(d)
		worst = max(worst, math.Abs(d))
		off += d * d
		all += float64(v) * float64(v)
	}
	l := Loss{Max: float32(worst)}
	if float64(l.Max) < worst {
		l.Max = math.Nextafter32(l.Max, math.MaxFloat32)
	}
	if all > 0 {
		l.Relative = math.Sqrt(off / all)
	}
	return l
}

func finite(v float32) bool { return math.Float32bits(v)>>23&0xff != 0xff }

// Feedback squeezes tensors that are added up at the other end, all of one length. What a frame loses is added to the
// next tensor, so that the sum of all that arrives differs from the sum of all that was sent by what the last frame lost,
// whatever the plans. It is not safe for use by several goroutines. The zero value is ready.
type Feedback struct {
	lost []float32
}

// Append appends the frame of x, and of what was lost before, to dst. x is not changed. The loss counts against that sum.
// When it fails, as Append or because x is not as long as the one before, nothing has happened.
func (f *Feedback) Append(dst []byte, x []float32, p Plan) ([]byte, Loss, error) {
	if f.lost != nil && len(f.lost) != len(x) {
		return dst, Loss{}, ErrPlan
	}
	sum := make([]float32, len(x))
	copy(sum, x)
	for i, v := range f.lost {
		sum[i] += v
	}
	lost := make([]float32, len(x))
	dst, l, err := appendFrame(dst, sum, p, lost)
	if err == nil {
		f.lost = lost
	}
	return dst, l, err
}

// Lost returns what has not arrived yet. It belongs to f, and is nil before the first frame.
func (f *Feedback) Lost() []float32 { return f.lost }
