package transfer

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const mbit = 1e6 / 8

// conformance: W2
func TestTheMethodFollowsThePredictedCost(t *testing.T) {
	const gib = 1 << 30
	two := DefaultMachine(2)
	upgraded := Similarity{Size: gib, Base: gib, Indexed: true, Same: 0.80, Zero: 0.10, Moved: 0.05, Novel: 0.05, Empty: 0.5, Plain: 0.30, Alike: 0.12, All: 0.30}
	remade := Similarity{Size: gib, Base: gib, Indexed: true, Same: 0.51, Moved: 0.485, Novel: 0.005, Plain: 0.30, Alike: 0.20, All: 0.30}
	disjoint := Similarity{Size: gib, Base: gib, Novel: 1, Plain: 0.4, Alike: 0.4, All: 0.4}
	for _, c := range []struct {
		name string
		s    Similarity
		link float64
		want Method
	}{
		{"little changed, slow link", upgraded, 10 * mbit, Delta},
		{"little changed, 100 Mbit/s", upgraded, 100 * mbit, Delta},
		{"little changed, 40 Gbit/s", upgraded, 40_000 * mbit, Dedup},
		{"half moved, 20 Mbit/s", remade, 20 * mbit, Delta},
		{"half moved, 1 Gbit/s", remade, 1000 * mbit, Dedup},
		{"nothing in common, no index, 100 Mbit/s", disjoint, 100 * mbit, Whole},
	} {
		if got := Predicted.Choose(c.s, Link{c.link}, two); got != c.want {
			t.Errorf("%s: %s, want %s of %+v", c.name, got, c.want, Predict(c.s, Link{c.link}, two))
		}
	}
	// What the fixed rule gets wrong: half of the blocks changed, and a whole copy costs far more.
	if got := ThirtyPercent.Choose(remade, Link{100 * mbit}, two); got != Whole {
		t.Errorf("30 %%: %s", got)
	}
	if got := ThirtyPercent.Choose(upgraded, Link{100 * mbit}, two); got != Delta {
		t.Errorf("30 %%: %s", got)
	}
	all := Predict(remade, Link{100 * mbit}, two)
	whole := all[slices.IndexFunc(all, func(e Estimate) bool { return e.Method == Whole })]
	if whole.Bytes < 100*all[0].Bytes {
		t.Errorf("whole: %d bytes, delta: %d", whole.Bytes, all[0].Bytes)
	}
}

func TestAPredictionIsInOrderAndSane(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		parts := [5]float64{r.Float64(), r.Float64(), r.Float64(), r.Float64(), r.Float64()}
		sum := parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
		s := Similarity{Size: r.Int64N(maxImage), Base: 1 + r.Int64N(maxImage), Indexed: r.IntN(2) == 0,
			Same: parts[0] / sum, Zero: parts[1] / sum, Moved: parts[2] / sum, Novel: parts[3] / sum, Shifted: parts[4] / sum, Plain: r.Float64()}
		s.Alike, s.Empty, s.All = s.Plain*r.Float64(), min(1, s.Zero+s.Same*r.Float64()), r.Float64()
		m := DefaultMachine(r.IntN(9))
		slow, fast := Predict(s, Link{1}, m), Predict(s, Link{1e12}, m)
		if len(slow) != 3 || slow[0].Time > slow[1].Time || slow[1].Time > slow[2].Time {
			t.Fatalf("%+v: %+v", s, slow)
		}
		for _, e := range slow {
			if e.Bytes < 0 || e.Bytes > s.Size || e.CPU < 0 || e.Time < 0 || e.Time > 366*24*time.Hour {
				t.Fatalf("%+v: %+v", s, e)
			}
		}
		if slow[0].Time < 365*24*time.Hour && fast[0].CPU > slow[0].CPU {
			t.Fatalf("a faster link makes it compute more: %+v: %+v, %+v", s, slow, fast)
		}
		if slow[0].Bytes > fast[0].Bytes && slow[0].Time < 365*24*time.Hour {
			t.Fatalf("a slower link makes it send more: %+v: %+v, %+v", s, slow, fast)
		}
	}
}
