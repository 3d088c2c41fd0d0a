package squeeze

import (
	"cmp"
	"slices"
)

// speeds are values per second that one core encodes by a form, losses counted; selecting is how fast the largest are found.
// They are what BenchmarkAppend takes of processor time on a server.
var speeds = [...]float64{F32: 75e6, BF16: 65e6, Int8: 45e6, Int4: 40e6}

const selecting = 65e6

// keeps are the fractions that are tried.
var keeps = [...]float64{0, 0.25, 0.05, 0.01}

// sampled is how many values are tried before all are.
const sampled = 1 << 14

// seconds is how long n values are predicted to be under way by a plan: squeezed, then sent.
func (p Plan) seconds(n int, bandwidth float64) float64 {
	k := p.kept(n)
	bytes := float64(headSize + forms[p.Form].bytes(k))
	work := float64(k) / speeds[p.Form]
	if k < n {
		bytes += min(float64(n)/8, 1.3*float64(k))
		work += float64(n) / selecting
	}
	return bytes/bandwidth + work
}

// AppendWithin appends the frame of x to dst by the plan that is predicted to be the soonest at the other end of a link of
// bandwidth bytes per second, among those by which the relative loss is at most tolerance. There is always one. It fails with
// ErrNotFinite, or ErrPlan if bandwidth or tolerance make no sense.
func AppendWithin(dst []byte, x []float32, bandwidth, tolerance float64) ([]byte, Plan, Loss, error) {
	if !(bandwidth > 0) || !(tolerance >= 0) {
		return dst, Plan{}, Loss{}, ErrPlan
	}
	plans := make([]Plan, 0, len(forms)*len(keeps))
	for f := range forms {
		for _, keep := range keeps {
			plans = append(plans, Plan{Form(f), keep})
		}
	}
	slices.SortStableFunc(plans, func(a, b Plan) int {
		return cmp.Compare(a.seconds(len(x), bandwidth), b.seconds(len(x), bandwidth))
	})
	part := sample(x)
	for _, p := range plans {
		// A part that loses more than allowed says that all of it would, as a rule; the whole decides when it does not.
		if p != (Plan{}) && len(part) < len(x) {
			if _, l, err := Append(nil, part, p); err != nil || l.Relative > tolerance {
				continue
			}
		}
		out, l, err := Append(dst, x, p)
		if err != nil || l.Relative <= tolerance {
			return out, p, l, err
		}
	}
	return dst, Plan{}, Loss{}, ErrPlan // not reached: the plan that keeps all loses nothing
}

// sample returns values of x from all over it, in runs of a block.
func sample(x []float32) []float32 {
	const run, runs = 64, sampled / 64
	if len(x) <= sampled {
		return x
	}
	part := make([]float32, 0, sampled)
	for i := range runs {
		at := i * (len(x) - run) / (runs - 1)
		part = append(part, x[at:at+run]...)
	}
	return part
}
