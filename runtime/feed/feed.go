// Package feed hands the events of a runtime to everyone who watches it.
package feed

import (
	"context"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Behind is how many events a reader may be behind before it loses the oldest.
const Behind = 256

// Feed hands every event to every reader. The zero value is ready for use.
type Feed struct {
	mu      sync.Mutex
	readers map[chan sandbox.Event]struct{}
	closed  bool
}

// Watch adds a reader. Its channel is closed when ctx or the feed ends.
func (f *Feed) Watch(ctx context.Context) <-chan sandbox.Event {
	ch := make(chan sandbox.Event, Behind)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		close(ch)
		return ch
	}
	if f.readers == nil {
		f.readers = map[chan sandbox.Event]struct{}{}
	}
	f.readers[ch] = struct{}{}
	context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, ok := f.readers[ch]; ok {
			delete(f.readers, ch)
			close(ch)
		}
	})
	return ch
}

// Send gives the event the present time and hands it out. It never blocks: a
// reader who is too far behind loses the oldest event.
func (f *Feed) Send(e sandbox.Event) {
	e.Time = time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	for ch := range f.readers {
		// We hold the lock, so nobody else fills the place that we make.
		if len(ch) == cap(ch) {
			select {
			case <-ch:
			default:
			}
		}
		ch <- e
	}
}

// Close ends all readers.
func (f *Feed) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for ch := range f.readers {
		close(ch)
	}
	clear(f.readers)
}
