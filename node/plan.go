package node

import (
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// actionKind is one thing that reconciling may find to do.
type actionKind string

const (
	actLose    actionKind = "lose"    // the record says it lives, the runtime says it does not
	actDiscard actionKind = "discard" // its creation or removal was interrupted
	actKill    actionKind = "kill"    // its time is up
	actPause   actionKind = "pause"   // its time is up and it asked to be paused
	actOrphan  actionKind = "orphan"  // a runtime has a machine that no record accounts for
	actAdopt   actionKind = "adopt"   // it lives: take up its ports and counters again
)

// action is what to do about one sandbox.
type action struct {
	kind    actionKind
	id      string
	runtime string
	reason  string
}

// observed is what the runtimes report: by runtime, then by sandbox. A runtime
// that could not be asked is absent, and nothing is concluded about its
// sandboxes.
type observed map[string]map[string]sandbox.Status

// plan compares intent with reality and says what to do. It is pure: the same
// arguments give the same actions. busy sandboxes have an operation under way
// and are left alone.
func plan(records []Sandbox, seen observed, busy func(id string) bool, now time.Time) []action {
	var out []action
	expected := make(map[string]bool, len(records))
	for _, r := range records {
		expected[r.ID] = hasMachine(r)
		if busy(r.ID) {
			continue
		}
		if a, ok := planOne(r, seen, now); ok {
			out = append(out, a)
		}
	}
	for name, all := range seen {
		for id := range all {
			if !expected[id] && !busy(id) {
				out = append(out, action{kind: actOrphan, id: id, runtime: name})
			}
		}
	}
	return out
}

// hasMachine reports whether a machine may exist for the record. None may once it
// has ended, was lost, or was saved to disk.
func hasMachine(r Sandbox) bool {
	switch r.State {
	case sandbox.Terminated, sandbox.Error:
		return false
	case sandbox.Paused:
		return r.Suspended == ""
	}
	return true
}

func planOne(r Sandbox, seen observed, now time.Time) (action, bool) {
	a := action{id: r.ID, runtime: r.Runtime}
	there, asked := seen[r.Runtime]
	status, exists := there[r.ID]
	due := r.EndAt != nil && !now.Before(*r.EndAt)
	switch r.State {
	case sandbox.Pending, sandbox.Creating, sandbox.Terminating:
		a.kind, a.reason = actDiscard, "interrupted while "+string(r.State)
		return a, true
	case sandbox.Terminated, sandbox.Error:
		return a, false
	}
	if r.Suspended == "" && asked {
		switch {
		case !exists:
			a.kind, a.reason = actLose, "the machine is gone"
			return a, true
		case status.State == sandbox.Error:
			a.kind, a.reason = actLose, status.Reason
			return a, true
		}
	}
	if due && r.State == sandbox.Running {
		a.kind, a.reason = actKill, "its time-out has passed"
		if r.Lifecycle.OnTimeout == TimeoutPause || r.Lifecycle.OnTimeout == TimeoutShelve {
			a.kind = actPause
		}
		return a, true
	}
	a.kind = actAdopt
	// The ports of one that waits for traffic are open, too.
	return a, r.State == sandbox.Running && exists || r.State == sandbox.Paused && r.Lifecycle.AutoResume && len(r.Ports) > 0
}

// nextDue is when the first running sandbox's time is up; zero when none has one.
func nextDue(records []Sandbox) time.Time {
	var first time.Time
	for _, r := range records {
		if r.State == sandbox.Running && r.EndAt != nil && (first.IsZero() || r.EndAt.Before(first)) {
			first = *r.EndAt
		}
	}
	return first
}
