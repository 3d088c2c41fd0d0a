package node

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

var epoch = time.Unix(1_700_000_000, 0)

func at(d time.Duration) *time.Time { t := epoch.Add(d); return &t }

func never(string) bool { return false }

func TestPlan(t *testing.T) {
	running := Sandbox{ID: "a", Runtime: "r", State: sandbox.Running}
	with := func(change func(*Sandbox)) Sandbox { r := running; change(&r); return r }
	there := observed{"r": {"a": {ID: "a", State: sandbox.Running}}}
	none := observed{"r": {}}
	for _, tc := range []struct {
		name string
		rec  Sandbox
		seen observed
		want actionKind // empty: nothing to do
	}{
		{"a running one is adopted", running, there, actAdopt},
		{"one that is gone is lost", running, none, actLose},
		{"one that died is lost", running, observed{"r": {"a": {ID: "a", State: sandbox.Error}}}, actLose},
		{"nothing is concluded from a runtime that did not answer", running, observed{}, ""},
		{"a creation that was interrupted is discarded", with(func(r *Sandbox) { r.State = sandbox.Creating }), there, actDiscard},
		{"a removal that was interrupted is completed", with(func(r *Sandbox) { r.State = sandbox.Terminating }), none, actDiscard},
		{"its time is up", with(func(r *Sandbox) { r.EndAt = at(0) }), there, actKill},
		{"its time is up and it is paused", with(func(r *Sandbox) {
			r.EndAt, r.Lifecycle.OnTimeout = at(-time.Second), TimeoutPause
		}), there, actPause},
		{"its time is not up", with(func(r *Sandbox) { r.EndAt = at(time.Second) }), there, actAdopt},
		{"lost goes before late", with(func(r *Sandbox) { r.EndAt = at(0) }), none, actLose},
		{"one paused on disk needs no machine", with(func(r *Sandbox) { r.State, r.Suspended = sandbox.Paused, "s" }), none, ""},
		{"one frozen in memory does", with(func(r *Sandbox) { r.State = sandbox.Paused }), none, actLose},
		{"a paused one's time stands still", with(func(r *Sandbox) {
			r.State, r.Suspended, r.EndAt = sandbox.Paused, "s", at(-time.Hour)
		}), none, ""},
		{"an ended one is left alone", with(func(r *Sandbox) { r.State = sandbox.Terminated }), none, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := plan([]Sandbox{tc.rec}, tc.seen, never, epoch)
			switch {
			case tc.want == "" && len(got) != 0:
				t.Fatalf("planned %v", got)
			case tc.want != "" && (len(got) != 1 || got[0].kind != tc.want):
				t.Fatalf("planned %v, want %s", got, tc.want)
			}
		})
	}
}

func TestPlanRemovesOrphansAndSparesTheBusy(t *testing.T) {
	seen := observed{"r": {"known": {}, "stray": {}, "making": {}}}
	recs := []Sandbox{{ID: "known", Runtime: "r", State: sandbox.Running}}
	busy := func(id string) bool { return id == "making" || id == "known" }
	got := plan(recs, seen, busy, epoch)
	if len(got) != 1 || got[0].kind != actOrphan || got[0].id != "stray" || got[0].runtime != "r" {
		t.Fatalf("planned %v", got)
	}
}

// Whatever the records and the reality, carrying out a plan must lead to a
// state for which there is nothing left to do but adopting.
func TestPlanConverges(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	states := []sandbox.State{sandbox.Pending, sandbox.Creating, sandbox.Running, sandbox.Paused, sandbox.Terminating, sandbox.Terminated, sandbox.Error}
	for range 2000 {
		recs, seen := make(map[string]Sandbox), observed{"r": {}}
		for i := range rng.IntN(6) {
			id := fmt.Sprint("s", i)
			r := Sandbox{ID: id, Runtime: "r", State: states[rng.IntN(len(states))]}
			if rng.IntN(3) == 0 {
				r.EndAt = at(time.Duration(rng.IntN(3)-1) * time.Second)
			}
			if r.State == sandbox.Paused && rng.IntN(2) == 0 {
				r.Suspended = "snap"
			}
			if rng.IntN(2) == 0 {
				r.Lifecycle.OnTimeout = TimeoutPause
			}
			recs[id] = r
		}
		for i := range 8 {
			if rng.IntN(2) == 0 {
				id := fmt.Sprint("s", i)
				seen["r"][id] = sandbox.Status{ID: id, State: []sandbox.State{sandbox.Running, sandbox.Error}[rng.IntN(2)]}
			}
		}
		for round := 0; ; round++ {
			if round > 3 {
				t.Fatalf("does not settle: %v, %v", recs, seen)
			}
			todo := 0
			for _, a := range plan(values(recs), seen, never, epoch) {
				if a.kind != actAdopt {
					todo++
				}
				simulate(a, recs, seen)
			}
			if todo == 0 {
				break
			}
		}
		for id, s := range seen["r"] {
			if r, ok := recs[id]; !ok || !hasMachine(r) {
				t.Fatalf("machine %v is not accounted for", s)
			}
		}
	}
}

func values(m map[string]Sandbox) (out []Sandbox) {
	for _, r := range m {
		out = append(out, r)
	}
	return out
}

// simulate does to the model what apply does to the world.
func simulate(a action, recs map[string]Sandbox, seen observed) {
	r := recs[a.id]
	switch a.kind {
	case actLose:
		r.State, r.EndAt = sandbox.Error, nil
		delete(seen["r"], a.id)
	case actDiscard, actKill:
		r.State = sandbox.Terminated
		delete(seen["r"], a.id)
	case actPause:
		r.State, r.Suspended = sandbox.Paused, "snap"
		delete(seen["r"], a.id)
	case actOrphan:
		delete(seen["r"], a.id)
		return
	default:
		return
	}
	recs[a.id] = r
}
