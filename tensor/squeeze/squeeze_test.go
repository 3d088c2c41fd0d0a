package squeeze

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// normal makes values as gradients and activations have them: of one magnitude, with outliers.
func normal(seed uint64, n int) []float32 {
	r := rand.New(rand.NewPCG(seed, 1))
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64() * 0.02)
		if r.IntN(500) == 0 {
			x[i] *= 40
		}
	}
	return x
}

// inputs are tensors, real and adversarial ones.
func inputs() map[string][]float32 {
	const tiny, huge = math.SmallestNonzeroFloat32, math.MaxFloat32
	r := rand.New(rand.NewPCG(2, 2))
	anything := make([]float32, 3000)
	for i := range anything {
		for anything[i] = float32(math.NaN()); !finite(anything[i]); {
			anything[i] = math.Float32frombits(r.Uint32())
		}
	}
	same := slices.Repeat([]float32{-0.25}, 777)
	mixed := make([]float32, 1000) // one value makes all others of its block vanish
	for i := range mixed {
		mixed[i] = float32(math.Pow(10, float64(i%70)-38))
	}
	return map[string][]float32{
		"none": {}, "one": {3.5}, "zeros": make([]float32, 200), "minus zero": {float32(math.Copysign(0, -1)), 0, 0},
		"normal": normal(1, 10_000), "odd": normal(2, 1023), "anything": anything, "same": same, "mixed": mixed,
		"huge": {huge, -huge, huge, 1}, "tiny": {tiny, -tiny, 3 * tiny, 0}, "tiny and huge": {tiny, huge, tiny, -huge},
		"ties": {1, -1, 1, -1, 1, 1, 1, 1, 1},
	}
}

func plans() (all []Plan) {
	for f := range forms {
		for _, keep := range []float64{0, 1, 0.9, 0.1, 0.001} {
			all = append(all, Plan{Form(f), keep})
		}
	}
	return all
}

// allowed is by how much a kept value may be off: by the largest magnitude among those that share its scale.
func allowed(f Form, v, most float32) float64 {
	of := map[Form]float64{F32: 0, BF16: math.Abs(float64(v)) / 256, Int8: float64(most) / 252, Int4: float64(most) / 13}[f]
	if f == F32 {
		return 0
	}
	return max(of, 0x1p-134)
}

// conformance: W6
func TestNoValueIsOffByMoreThanTheFormAllowsAndTheLossSays(t *testing.T) {
	for name, x := range inputs() {
		for _, p := range plans() {
			t.Run(fmt.Sprintf("%s/%s/%g", name, p.Form, p.Keep), func(t *testing.T) {
				frame, l, err := Append([]byte("before"), x, p)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]float32, len(x))
				bound, err := Decode(got, frame[len("before"):])
				if err != nil {
					t.Fatal(err)
				}
				var worst, off, all float64
				var kept []int
				for i := range x {
					d := math.Abs(float64(x[i]) - float64(got[i]))
					worst, off, all = max(worst, d), off+d*d, all+float64(x[i])*float64(x[i])
				}
				if kept = reference(x, p.kept(len(x))); len(kept) < len(x) {
					for i := range x {
						if _, is := slices.BinarySearch(kept, i); !is && got[i] != 0 {
							t.Fatalf("value %d is %g and should not be there", i, got[i])
						}
					}
				}
				block := max(forms[p.Form].block, 1)
				for i, at := range kept {
					var most float32
					for _, j := range kept[i/block*block : min((i/block+1)*block, len(kept))] {
						most = max(most, float32(math.Abs(float64(x[j]))))
					}
					if d := math.Abs(float64(x[at]) - float64(got[at])); d > allowed(p.Form, x[at], most) {
						t.Fatalf("value %d, %g of at most %g, is %g", at, x[at], most, got[at])
					}
				}
				if bound != l.Max || float64(bound) < worst || float64(bound) > worst*1.000001+math.SmallestNonzeroFloat32 {
					t.Errorf("at most %g off, said to be %g and %g", worst, bound, l.Max)
				}
				if all > 0 && math.Abs(l.Relative-math.Sqrt(off/all)) > 1e-9 || l.Relative > 1 {
					t.Errorf("relative loss %g, said to be %g", math.Sqrt(off/all), l.Relative)
				}
			})
		}
	}
}

// reference returns the positions of the k values of the largest magnitude, by sorting.
func reference(x []float32, k int) []int {
	at := make([]int, len(x))
	for i := range at {
		at[i] = i
	}
	slices.SortStableFunc(at, func(a, b int) int { return int(magnitude(x[b])) - int(magnitude(x[a])) })
	at = at[:k]
	slices.Sort(at)
	return at
}

// conformance: W6
func TestFramesAreAsSmallAsTheirPlansSay(t *testing.T) {
	const n = 1 << 16
	x := normal(3, n)
	for _, c := range []struct {
		plan  Plan
		bytes int // at most
	}{
		{Plan{F32, 0}, 4*n + 10}, {Plan{BF16, 0}, 2*n + 10}, {Plan{Int8, 0}, n + n/32 + 10}, {Plan{Int4, 0}, n/2 + n/16 + 10},
		{Plan{F32, 0.01}, 656*4 + 656*13/10 + 12}, {Plan{Int8, 0.01}, 656 + 22 + 656*13/10 + 12}, {Plan{Int4, 0.5}, n/4 + n/32 + n/8 + 13},
	} {
		frame, l, err := Append(nil, x, c.plan)
		if err != nil || len(frame) > c.bytes {
			t.Errorf("%+v: %d bytes, want %d at most; %v", c.plan, len(frame), c.bytes, err)
		}
		t.Logf("measured: W6 %s, keeping %g: %.1fx smaller, %.2f %% lost", c.plan.Form, max(c.plan.Keep, 1-math.Ceil(c.plan.Keep)), 4*n/float64(len(frame)), 100*l.Relative)
	}
}

func TestAFrameIsAFunctionOfItsValues(t *testing.T) {
	x := normal(4, 5000)
	was := slices.Clone(x)
	for _, p := range plans() {
		a, _, err := Append(nil, x, p)
		b, _, _ := Append(make([]byte, 0, 1<<20), x, p)
		if err != nil || string(a) != string(b) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if !slices.Equal(x, was) {
		t.Error("the values were changed")
	}
}

func TestWhatCannotBeSqueezedIsRefused(t *testing.T) {
	for _, bad := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		x := []float32{1, float32(bad), 2}
		if out, _, err := Append([]byte("before"), x, Plan{Form: Int8}); !errors.Is(err, ErrNotFinite) || string(out) != "before" {
			t.Errorf("%g: %q, %v", bad, out, err)
		}
		if _, _, _, err := AppendWithin(nil, x, 1e6, 0.1); !errors.Is(err, ErrNotFinite) {
			t.Errorf("%g: %v", bad, err)
		}
		if _, _, err := Append(nil, x[:1], Plan{Keep: bad}); !errors.Is(err, ErrPlan) {
			t.Errorf("keep %g: %v", bad, err)
		}
		if _, _, _, err := AppendWithin(nil, x[:1], math.NaN(), 0); !errors.Is(err, ErrPlan) {
			t.Error(err)
		}
	}
	if _, _, err := Append(nil, nil, Plan{Form: 9}); !errors.Is(err, ErrPlan) {
		t.Error(err)
	}
}

// conformance: W6
func TestWhatFramesLoseArrivesLater(t *testing.T) {
	const n, steps = 4000, 60
	for _, p := range []Plan{{F32, 0.01}, {Int4, 0}, {Int4, 0.05}, {Int8, 0.3}, {BF16, 0}} {
		var f Feedback
		sent, arrived, got := make([]float64, n), make([]float64, n), make([]float32, n)
		longest := 0.0
		var early, late float64 // what is missing in the average of all that was sent
		for step := range steps {
			x := normal(uint64(step), n)
			frame, _, err := f.Append(nil, x, p)
			if err == nil {
				_, err = Decode(got, frame)
			}
			if err != nil {
				t.Fatal(err)
			}
			missing := 0.0
			for i := range x {
				sent[i] += float64(x[i])
				arrived[i] += float64(got[i])
				missing += (sent[i] - arrived[i]) * (sent[i] - arrived[i])
				if d := sent[i] - arrived[i] - float64(f.Lost()[i]); math.Abs(d) > 1e-5 {
					t.Fatalf("%+v, step %d: %g of value %d is neither here nor there", p, step, d, i)
				}
			}
			longest = max(longest, length(x))
			if late = math.Sqrt(missing) / float64(step+1); step == steps/6-1 {
				early = late
			}
			// A frame that keeps the largest k of n values leaves at most the fraction q of the length.
			if q := math.Sqrt(1 - p.Keep); p.Form == F32 && math.Sqrt(missing) > q/(1-q)*longest {
				t.Fatalf("%+v, step %d: %g is missing", p, step, math.Sqrt(missing))
			}
		}
		if late > early/1.5 {
			t.Errorf("%+v: missing in the average are %g, then %g", p, early, late)
		}
	}
}

func length(x []float32) float64 {
	sum := 0.0
	for _, v := range x {
		sum += float64(v) * float64(v)
	}
	return math.Sqrt(sum)
}

// A value that is never among the largest would never be sent without feedback.
func TestWhatIsAlwaysSmallArrivesInTheEnd(t *testing.T) {
	var f Feedback
	got, sum := make([]float32, 2), make([]float64, 2)
	for step := range 1000 {
		x := []float32{float32(1 - 2*(step%2)), 0.01}
		frame, _, err := f.Append(nil, x, Plan{Keep: 0.5})
		if err == nil {
			_, err = Decode(got, frame)
		}
		if err != nil {
			t.Fatal(err)
		}
		sum[0], sum[1] = sum[0]+float64(got[0]), sum[1]+float64(got[1])
	}
	if math.Abs(sum[1]-10) > 2.1 {
		t.Errorf("of 10, %g arrived", sum[1])
	}
}

func TestAFailedFrameLeavesTheFeedbackAsItWas(t *testing.T) {
	var f Feedback
	x := normal(9, 100)
	if _, _, err := f.Append(nil, x, Plan{Form: Int4}); err != nil {
		t.Fatal(err)
	}
	was := slices.Clone(f.Lost())
	for _, bad := range [][]float32{x[:50], append(slices.Clone(x[1:]), float32(math.Inf(1)))} {
		if _, _, err := f.Append(nil, bad, Plan{Form: Int4}); err == nil {
			t.Error("it was taken")
		}
		if !slices.Equal(f.Lost(), was) {
			t.Error("the feedback has changed")
		}
	}
}

// conformance: W6
func TestThePlanFollowsTheLinkAndKeepsTheTolerance(t *testing.T) {
	for name, x := range inputs() {
		for _, tolerance := range []float64{0, 0.002, 0.02, 0.3, 0.99} {
			last := 0
			for _, bandwidth := range []float64{1e4, 1e7, 1e9, 1e12} {
				frame, p, l, err := AppendWithin(nil, x, bandwidth, tolerance)
				if err != nil || l.Relative > tolerance {
					t.Fatalf("%s, %g: %+v loses %g; %v", name, tolerance, p, l.Relative, err)
				}
				if _, err := Decode(make([]float32, len(x)), frame); err != nil {
					t.Fatal(err)
				}
				if name == "normal" && len(frame) < last {
					t.Errorf("tolerance %g: a faster link gets %d bytes, a slower one %d", tolerance, len(frame), last)
				}
				last = len(frame)
			}
		}
	}
	big := normal(5, 1<<17) // decided by a part of it
	for tolerance, want := range map[float64]Plan{0: {F32, 0}, 0.005: {BF16, 0}, 0.03: {Int8, 0}} {
		if _, p, _, err := AppendWithin(nil, big, 1e6, tolerance); err != nil || p != want {
			t.Errorf("tolerance %g: %+v, want %+v; %v", tolerance, p, want, err)
		}
	}
}

func TestDamagedFramesAreRefused(t *testing.T) {
	x := normal(6, 333)
	for _, p := range plans() {
		frame, _, err := Append(nil, x, p)
		if err != nil {
			t.Fatal(err)
		}
		for name, bad := range map[string][]byte{
			"empty": nil, "cut": frame[:len(frame)-1], "head": frame[:headSize], "longer": append(slices.Clone(frame), 0),
			"version": with(frame, 0, 2), "form": with(frame, 1, 4), "positions": with(frame, kindAt, 3), "bound": with(frame, maxErrAt+3, 0xff),
		} {
			if _, err := Decode(make([]float32, len(x)), bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%+v, %s: %v", p, name, err)
			}
		}
		for _, n := range []int{0, len(x) - 1, len(x) + 1} {
			if _, err := Decode(make([]float32, n), frame); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%+v was taken for %d values: %v", p, n, err)
			}
		}
	}
	// Few bytes claim many values.
	bomb := binary.AppendUvarint(append([]byte{version, byte(F32), gaps, 0, 0, 0, 0}, 205, 2), 333)
	if _, err := Decode(make([]float32, 333), bomb); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

func with(b []byte, at int, v byte) []byte {
	b = slices.Clone(b)
	b[at] = v
	return b
}

func FuzzDecode(f *testing.F) {
	x := normal(7, 40)
	for _, p := range plans() {
		frame, _, err := Append(nil, x, p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame, uint16(len(x)))
	}
	f.Fuzz(func(t *testing.T, frame []byte, n uint16) {
		x := make([]float32, n)
		if _, err := Decode(x, frame); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for i, v := range x {
			if !finite(v) {
				t.Fatalf("value %d is %g", i, v)
			}
		}
	})
}

func FuzzAnyValuesGoThere(f *testing.F) {
	f.Add([]byte{0, 0, 128, 63, 255, 255, 127, 127, 1, 0, 0, 0}, byte(2), byte(100))
	f.Fuzz(func(t *testing.T, raw []byte, form, keep byte) {
		x := make([]float32, len(raw)/4)
		for i := range x {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		}
		p := Plan{Form(form), float64(keep) / 255}
		frame, l, err := Append(nil, x, p)
		if err != nil {
			if !errors.Is(err, ErrNotFinite) && !errors.Is(err, ErrPlan) {
				t.Fatal(err)
			}
			return
		}
		got := make([]float32, len(x))
		if _, err := Decode(got, frame); err != nil {
			t.Fatal(err)
		}
		for i := range x {
			if d := math.Abs(float64(x[i]) - float64(got[i])); d > float64(l.Max) {
				t.Fatalf("value %d, %g, is %g: more than %g off", i, x[i], got[i], l.Max)
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	x := normal(8, 1<<20)
	for _, p := range []Plan{{F32, 0}, {BF16, 0}, {Int8, 0}, {Int4, 0}, {F32, 0.01}} {
		b.Run(fmt.Sprintf("%s-%g", p.Form, p.Keep), func(b *testing.B) {
			b.SetBytes(int64(4 * len(x)))
			var out []byte
			for b.Loop() {
				out, _, _ = Append(out[:0], x, p)
			}
		})
	}
}
