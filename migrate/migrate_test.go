package migrate

import (
	"fmt"
	"slices"
	"testing"
)

// world is both nodes as far as a move concerns them, and a network that loses requests and answers.
type world struct {
	here, frozen  bool // at the source: it runs, or stands still
	there         bool // it runs at the target
	prepared, got bool // the target would start it; it has the final state
	delayed       []Step
}

// fault is what goes wrong with one step.
type fault int

const (
	none      fault = iota
	refused         // the step fails and says so
	lost            // it never arrives
	unheard         // it happens, and the answer is lost
	late            // it arrives after the next step
	cancelled       // it happens, and the user gives up
	killed          // it happens, and the source is killed before it notes that
)

var faults = []fault{none, refused, lost, unheard, late, cancelled, killed}

// act is what the step does to the world, and what is answered.
func (w *world) act(s Step) Outcome {
	switch s {
	case Prepare:
		w.prepared = true
	case Freeze:
		w.here, w.frozen = false, true
	case Stream:
		w.here, w.frozen, w.got = false, true, true
	case Send:
		w.got = true
	case Switch:
		if !w.prepared || !w.got || w.there {
			if w.there {
				return Done
			}
			return Failed
		}
		w.there = true
	case Ask:
		if w.there {
			return Runs
		}
		w.prepared = false
	case Thaw:
		w.here, w.frozen = true, false
	case Clean:
		w.frozen = false
	case Drop:
		if !w.there {
			w.prepared, w.got = false, false
		}
	}
	return Done
}

// remote are the steps that travel.
var remote = []Step{Prepare, Copy, Send, Switch, Ask, Drop}

// run drives a move with a fault at each of the first steps, and none after these.
func run(plan []fault, live bool) (w world, trace []string, err error) {
	w = world{here: true}
	s := Begin()
	copies := []int64{100 << 20, 10 << 20, 100 << 10}
	for i := 0; !s.Over(); i++ {
		if i > 60 {
			return w, trace, fmt.Errorf("it never ends")
		}
		f := none
		if i < len(plan) {
			f = plan[i]
		}
		far := slices.Contains(remote, s.Step)
		var o Outcome
		cancel := false
		pending := w.delayed
		w.delayed = nil
		switch {
		case f == refused && s.Step == Stream:
			o = Refused
		case s.Step == Stream && (f == lost || f == unheard || f == late):
			o = Failed // nobody was told to start it
		case f == refused:
			o = Failed
		case f == lost && far:
			o = Unknown
		case f == late && far:
			w.delayed = append(w.delayed, s.Step)
			o = Unknown
		case f == unheard && far:
			w.act(s.Step)
			o = Unknown
		default:
			o = w.act(s.Step)
			cancel = f == cancelled
		}
		for _, d := range pending { // what was under way arrives after what was sent later
			w.act(d)
		}
		if w.here && w.there {
			return w, trace, fmt.Errorf("it runs in two places")
		}
		wire := int64(0)
		if s.Step == Copy {
			wire = copies[min(len(s.Rounds), len(copies)-1)]
		}
		trace = append(trace, fmt.Sprintf("%s/%d", s.Step, f))
		if f == killed {
			if w.frozen || s.Away() && w.there { // the source's record says that it was leaving
				s = Recover()
			} else {
				s = State{Step: Stayed} // nobody knows of the move any more
			}
			if w.here && !w.frozen {
				s = State{Step: Stayed}
			}
			if s.Step == Ask && !w.frozen && w.there {
				s = State{Step: Moved}
			}
			continue
		}
		prepared := s.Step == Prepare
		s = s.Next(o, wire, cancel)
		s.Live = s.Live || prepared && live
	}
	switch {
	case s.Step == Moved && (w.here || w.frozen || !w.there):
		err = fmt.Errorf("moved, but %+v", w)
	case s.Step == Stayed && (!w.here || w.frozen || w.there):
		err = fmt.Errorf("stayed, but %+v", w)
	}
	return w, trace, err
}

// conformance: V3
func TestWhateverFailsTheSandboxRunsInOnePlace(t *testing.T) {
	moved, stayed, all := 0, 0, 0
	// Every fault at every step, and every two faults at every two steps.
	const steps = 14
	for i := range 2 * steps {
		live := i >= steps
		for j := i % steps; j < steps; j++ {
			for _, a := range faults {
				for _, b := range faults {
					plan := make([]fault, steps)
					plan[i%steps], plan[j] = a, b
					w, trace, err := run(plan, live)
					if err != nil {
						t.Fatalf("%v: %v", trace, err)
					}
					all++
					if w.there {
						moved++
					} else {
						stayed++
					}
				}
			}
		}
	}
	t.Logf("measured: V3 %d moves with faults: %d moved, %d stayed, 0 in two places, 0 in none", all, moved, stayed)
	if moved == 0 || stayed == 0 {
		t.Error("the faults do not reach both ends")
	}
}

func TestAMoveWithoutFaultsTakesTheSteps(t *testing.T) {
	for live, want := range map[bool][]string{
		false: {"prepare/0", "copy/0", "copy/0", "copy/0", "freeze/0", "send/0", "switch/0", "clean/0"},
		true:  {"prepare/0", "copy/0", "stream/0", "switch/0", "clean/0"},
	} {
		if _, trace, err := run(nil, live); err != nil || !slices.Equal(trace, want) {
			t.Errorf("%v, %v", trace, err)
		}
	}
	_, trace, err := run([]fault{none, none, refused}, true)
	if want := []string{"prepare/0", "copy/0", "stream/1", "copy/0", "copy/0", "freeze/0", "send/0", "switch/0", "clean/0"}; err != nil || !slices.Equal(trace, want) {
		t.Errorf("%v, %v", trace, err)
	}
}

func TestCopiesEndWhenTheyNoLongerShrink(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		rounds []int64
		want   bool
	}{
		{nil, true}, {[]int64{mib}, false}, {[]int64{100 * mib}, true}, {[]int64{100 * mib, 60 * mib}, true},
		{[]int64{100 * mib, 90 * mib}, false}, {[]int64{100 * mib, 20 * mib, mib / 2}, false},
		{[]int64{100 * mib, 50 * mib, 20 * mib, 8 * mib}, false},
	} {
		if got := again(c.rounds); got != c.want {
			t.Errorf("after %v: %v", c.rounds, got)
		}
	}
}
