package server

import (
	"sync"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
)

// subscriberBacklog bounds the events that wait for one client. With chunks of
// outputChunk bytes, a client that does not read holds 256 KiB.
const subscriberBacklog = 8

// fanout delivers the events of one process to any number of clients. A full
// client makes publish wait, and thereby the process's pipe fill up and the
// process wait: output is neither lost nor piled up. A client that leaves holds
// up nobody, and with no clients at all output is dropped.
type fanout struct {
	mu   sync.Mutex
	subs []*subscription         // replaced, never changed in place
	end  *processpb.ProcessEvent // the last event, once published
}

// subscription is one client's place in a fanout.
type subscription struct {
	events chan *processpb.ProcessEvent
	gone   chan struct{} // closed when the client left
}

// subscribe joins. After the end, the end event is all there is.
func (f *fanout) subscribe() *subscription {
	s := &subscription{
		events: make(chan *processpb.ProcessEvent, subscriberBacklog),
		gone:   make(chan struct{}),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.end != nil {
		s.events <- f.end
		return s
	}
	f.subs = append(f.subs[:len(f.subs):len(f.subs)], s)
	return s
}

// leave ends a subscription. It is called once.
func (f *fanout) leave(s *subscription) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rest := make([]*subscription, 0, len(f.subs))
	for _, other := range f.subs {
		if other != s {
			rest = append(rest, other)
		}
	}
	f.subs = rest
	close(s.gone)
}

// publish delivers an event to all and waits for the slowest.
func (f *fanout) publish(event *processpb.ProcessEvent) {
	f.mu.Lock()
	subs := f.subs
	if event.GetEnd() != nil {
		f.end = event
	}
	f.mu.Unlock()
	for _, s := range subs {
		select {
		case s.events <- event:
		case <-s.gone:
		}
	}
}
