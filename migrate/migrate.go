// Package migrate decides the steps of a live move of a sandbox from one node to another.
//
// It is a pure state machine: it has no clock and does nothing. Whoever drives it carries out a Step, says what came of it,
// and gets the next. Whatever happens, and in whatever order:
//
//   - the sandbox runs in at most one place, since the target starts it only after the source has frozen it (in Freeze, or at
//     the end of Stream), and the source lets it go on only after the target has promised that it does not run there and
//     never will, or was never told to start it;
//   - the source has it until the target has acknowledged that it runs there;
//   - every move ends, with the sandbox running in one of the two, once both nodes answer again.
package migrate

// Step is what is to be done next.
type Step string

// The steps. Each can be repeated.
const (
	Prepare Step = "prepare" // ask the target whether it can take the sandbox
	Copy    Step = "copy"    // snapshot the sandbox, which goes on, and send that
	Stream  Step = "stream"  // send it while it runs, then stop it and send the rest, and note that it is leaving
	Freeze  Step = "freeze"  // stop the sandbox with its state on disk, and note that it is leaving
	Send    Step = "send"    // send that state: what changed since the last copy
	Switch  Step = "switch"  // have the target start it
	Ask     Step = "ask"     // have the target give up; it answers when it runs there already
	Thaw    Step = "thaw"    // let the sandbox go on here
	Clean   Step = "clean"   // remove it here: it runs there
	Drop    Step = "drop"    // have the target forget what it was sent
	Moved   Step = "moved"   // the end: it runs there
	Stayed  Step = "stayed"  // the end: it runs here
)

// Outcome is what came of a step.
type Outcome int

// The outcomes.
const (
	Done    Outcome = iota
	Failed          // it has not happened, and will not
	Unknown         // it may have happened, or may yet: the answer was lost
	Runs            // of Ask: the sandbox runs there
	Refused         // of Stream: it cannot be sent so, and goes on; it can by snapshots
)

// State is how far a move is. The zero value is not one; see Begin and Recover.
type State struct {
	Step   Step    `json:"step"`
	Live   bool    `json:"live,omitempty"`   // it can be sent while it runs, after one copy, which may be of little
	Rounds []int64 `json:"rounds,omitempty"` // bytes that each copy took
}

// Begin is the state of a move that has not begun.
func Begin() State { return State{Step: Prepare} }

// Recover is the state of a move whose source was killed after the sandbox was frozen: what the target did is not known.
func Recover() State { return State{Step: Ask} }

// Over reports whether the move has ended.
func (s State) Over() bool { return s.Step == Moved || s.Step == Stayed }

// Away reports whether the caller's giving up can no longer undo what the step may do.
func (s State) Away() bool {
	return s.Step == Switch || s.Step == Ask || s.Step == Thaw || s.Step == Clean || s.Step == Drop
}

// MaxRounds bounds the copies that are made while the sandbox runs.
const MaxRounds = 4

// smallEnough is how many bytes are sent while the sandbox stands still without another thought.
const smallEnough = 1 << 20

// again reports whether another copy is worth its while: there was much to send, and clearly less than the time before.
func again(rounds []int64) bool {
	n := len(rounds)
	switch {
	case n == 0:
		return true
	case n >= MaxRounds || rounds[n-1] <= smallEnough:
		return false
	}
	return n == 1 || rounds[n-1] < rounds[n-2]/10*7
}

// copied returns the state after a copy of so many bytes.
func (s State) copied(wire int64) State {
	next := State{Step: Freeze, Live: s.Live, Rounds: append(append([]int64(nil), s.Rounds...), wire)}
	switch {
	case s.Live:
		next.Step = Stream
	case again(next.Rounds):
		next.Step = Copy
	}
	return next
}

// Next returns the state after a step. wire is the bytes that a Copy sent. cancelled says that the caller has given up,
// which counts until the target was told to start the sandbox.
func (s State) Next(o Outcome, wire int64, cancelled bool) State {
	to := func(step Step) State { return State{Step: step, Live: s.Live, Rounds: s.Rounds} }
	good := o == Done && !cancelled
	switch s.Step {
	case Prepare:
		if good {
			return to(Copy)
		}
		return to(Drop)
	case Copy:
		if !good {
			return to(Drop)
		}
		return s.copied(wire)
	case Stream:
		switch {
		case good:
			return to(Switch)
		case o == Refused && !cancelled:
			s.Live = false
			return to(Copy) // the one before may be without what has changed of it
		}
		return to(Thaw) // also when it goes on already
	case Freeze:
		if good {
			return to(Send)
		}
		return to(Thaw) // also after a failure: to let go on what goes on does nothing
	case Send:
		if good {
			return to(Switch)
		}
		return to(Thaw) // the target was not told to start anything
	case Switch:
		switch o {
		case Done:
			return to(Clean)
		case Failed:
			return to(Thaw)
		}
		return to(Ask)
	case Ask:
		switch o {
		case Runs:
			return to(Clean)
		case Done:
			return to(Thaw)
		}
		return to(Ask)
	case Thaw:
		if o == Done {
			return to(Drop)
		}
		return to(Thaw)
	case Clean:
		if o == Done {
			return to(Moved)
		}
		return to(Clean)
	case Drop:
		return to(Stayed) // what is left there is swept there
	}
	return s
}
