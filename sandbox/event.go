package sandbox

import "time"

// EventKind is what an event is about.
type EventKind string

// The kinds of event.
const (
	EventState    EventKind = "state"    // State changed
	EventError    EventKind = "error"    // something failed; State may be Error
	EventResource EventKind = "resource" // a limit was reached or is near: out of memory, disk full
	EventHealth   EventKind = "health"   // the guest stopped or began to answer
	EventMain     EventKind = "main"     // the main command started or ended
)

// Event is something that happened to a sandbox.
type Event struct {
	Seq     uint64    `json:"seq,omitempty"` // given by the node; grows without gaps
	Time    time.Time `json:"time"`
	Sandbox string    `json:"sandbox"`
	Kind    EventKind `json:"kind"`
	State   State     `json:"state,omitempty"` // the state after the event
	Reason  string    `json:"reason,omitempty"`
}
