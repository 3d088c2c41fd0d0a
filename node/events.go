package node

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	eventsKept   = 4096 // events that a late reader can still have
	eventsQueued = 256  // events that one slow reader may lag behind
)

// hub gives out events in order. The newest eventsKept are kept for readers who
// come back.
type hub struct {
	mu   sync.Mutex
	seq  uint64
	ring []sandbox.Event // oldest first, at most eventsKept
	subs map[chan sandbox.Event]struct{}
}

func newHub() *hub { return &hub{subs: make(map[chan sandbox.Event]struct{})} }

// publish numbers and sends an event. It never waits: a reader whose queue is
// full loses its oldest event and can see by the gap in Seq that it did.
func (h *hub) publish(e sandbox.Event) sandbox.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seq++
	e.Seq = h.seq
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	if len(h.ring) == eventsKept {
		h.ring = append(h.ring[:0], h.ring[1:]...)
	}
	h.ring = append(h.ring, e)
	for ch := range h.subs {
		for sent := false; !sent; {
			select {
			case ch <- e:
				sent = true
			default:
				select {
				case <-ch: // make room
				default:
				}
			}
		}
	}
	return e
}

// watch sends the kept events after since, then new ones, until ctx ends.
func (h *hub) watch(ctx context.Context, since uint64) <-chan sandbox.Event {
	live := make(chan sandbox.Event, eventsQueued)
	h.mu.Lock()
	var old []sandbox.Event
	for _, e := range h.ring {
		if e.Seq > since {
			old = append(old, e)
		}
	}
	h.subs[live] = struct{}{}
	h.mu.Unlock()

	out := make(chan sandbox.Event)
	go func() {
		defer close(out)
		defer func() {
			h.mu.Lock()
			delete(h.subs, live)
			h.mu.Unlock()
		}()
		send := func(e sandbox.Event) bool {
			select {
			case out <- e:
				return true
			case <-ctx.Done():
				return false
			}
		}
		for _, e := range old {
			if !send(e) {
				return
			}
		}
		for {
			select {
			case e := <-live:
				if !send(e) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// Events delivers what happens from event number since on (0: from the oldest
// that is still kept; the newest Seq is in Info), until ctx ends.
func (n *Node) Events(ctx context.Context, since uint64) <-chan sandbox.Event {
	return n.hub.watch(ctx, since)
}

// Wait returns once the sandbox is in one of the states; with none given, once
// there is nothing more to wait for: its main command or the sandbox has ended.
// A sandbox that was removed counts as Terminated. Asked for a state that can no
// longer come, it fails with Conflict.
func (n *Node) Wait(ctx context.Context, ref string, states ...sandbox.State) (Sandbox, error) {
	const op = "node.Wait"
	// Watch first, then look: a change between the two is then not missed.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	events := n.hub.watch(ctx, n.hub.last())
	e, err := n.find(op, ref)
	if err != nil {
		return Sandbox{}, err
	}
	for {
		sb := n.latest(e)
		ended := sb.State == sandbox.Terminated || sb.State == sandbox.Error
		switch {
		case slices.Contains(states, sb.State), len(states) == 0 && (ended || sb.Main.over()):
			return sb, nil
		case ended:
			return sb, sandbox.Errorf(op, sandbox.Conflict, sb.Name, "it is %s and will not be %v", sb.State, states)
		}
		for changed := false; !changed; {
			ev, ok := <-events
			if !ok {
				return sb, sandbox.E(op, "", sb.Name, ctx.Err())
			}
			changed = ev.Sandbox == sb.ID
		}
	}
}

// latest is the entry's record; of one that is kept no more, the last there was.
func (n *Node) latest(e *entry) Sandbox {
	n.mu.RLock()
	defer n.mu.RUnlock()
	sb := e.rec
	if n.entries[sb.ID] != e {
		sb.State = sandbox.Terminated
	}
	return sb
}

func (h *hub) last() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seq
}
