package prefetch

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

func numbers(from, to uint32) (out []uint32) {
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}

func TestOneRestoreIsForeseenAsItWas(t *testing.T) {
	var m Model
	if plan := m.Plan(); len(plan) != 0 {
		t.Errorf("a model that knows nothing plans %d pages", len(plan))
	}
	trace := []uint32{9, 3, 1 << 31, 4, 0}
	m.Learn(trace)
	if plan := m.Plan(); !slices.Equal(plan, trace) {
		t.Errorf("planned %v", plan)
	}
}

func TestPagesThatRecurAreKeptAndOthersForgotten(t *testing.T) {
	var m Model
	r := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		core := numbers(0, 1000)
		for range 300 {
			core = append(core, 10000+r.Uint32N(1<<20))
		}
		m.Learn(core)
	}
	plan := m.Plan()
	if got := Compare(plan, numbers(0, 1000)); got.Coverage() != 1 || got.Accuracy() < 0.99 {
		t.Errorf("%+v", got)
	}
	if !slices.Equal(plan[:1000], numbers(0, 1000)) {
		t.Error("not in the order of first touch")
	}
	if len(m.pages) > 20000 {
		t.Errorf("it remembers %d pages", len(m.pages))
	}
	// Work changes: after few restores the plan is of the new work.
	for range 12 {
		m.Learn(numbers(5000, 6000))
	}
	if got := Compare(m.Plan(), numbers(5000, 6000)); got.Coverage() != 1 || got.Accuracy() < 0.5 {
		t.Errorf("after a change: %+v", got)
	}
}

func TestAtMostHalfOfAPlanIsExpectedInVain(t *testing.T) {
	var m Model
	for i := range uint32(8) {
		m.Learn(append(numbers(0, 100), numbers(1000+i*1000, 2000+i*1000)...))
	}
	if plan := m.Plan(); len(plan) > 200 {
		t.Errorf("planned %d pages for 100 that recur", len(plan))
	}
}

func TestAModelIsBounded(t *testing.T) {
	var m Model
	m.Learn(numbers(0, 3*MaxPages))
	m.Learn(numbers(10*MaxPages, 11*MaxPages))
	if len(m.pages) != MaxPages {
		t.Errorf("it remembers %d pages", len(m.pages))
	}
	b, _ := m.AppendBinary(nil)
	if len(b) > 5*MaxPages+64 {
		t.Errorf("it takes %d bytes", len(b))
	}
}

func TestAChildBeginsWithWhatItsParentKnew(t *testing.T) {
	var m Model
	for range 8 {
		m.Learn(numbers(0, 100))
	}
	c := m.Child()
	c.Learn(numbers(50, 150))
	if got := Compare(c.Plan(), numbers(50, 150)); got.Coverage() != 1 {
		t.Errorf("its first own restore counts for too little: %+v", got)
	}
	if !slices.Equal(m.Plan(), numbers(0, 100)) {
		t.Error("the parent has changed")
	}
}

func FuzzParse(f *testing.F) {
	var m Model
	f.Add([]byte(magic + "\x00\x00"))
	m.Learn([]uint32{5, 1, 1<<32 - 1})
	m.Learn([]uint32{5, 7})
	b, _ := m.AppendBinary(nil)
	f.Add(b)
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err != nil {
			return
		}
		b, _ := m.AppendBinary(nil)
		again, err := Parse(b)
		if err != nil || again.runs != m.runs || !slices.Equal(again.pages, m.pages) {
			t.Fatalf("%v; %+v became %+v", err, m, again)
		}
		m.Learn(m.Plan())
		if b2, _ := m.AppendBinary(nil); len(b2) > len(data)+8*len(m.pages)+64 || !bytes.HasPrefix(b2, []byte(magic)) {
			t.Fatal("it grew by learning what it planned")
		}
	})
}
