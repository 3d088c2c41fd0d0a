package pace

import (
	"context"
	"sync"
	"time"
)

const (
	// burst is how far a Pacer may run ahead of its rate, so that timers that fire late cost nothing.
	burst = 20 * time.Millisecond
	// slice is the most that is let go at once, in bytes: whoever asks for more gets it in slices, so that nobody waits behind a
	// piece that has gone away or is larger than the link.
	slice = 1 << 20
)

// Pacer lets pieces go at a rate, in the order of a Queue. It is safe for use by several goroutines.
type Pacer struct {
	rate float64 // bytes per second; 0: no limit

	mu    sync.Mutex
	queue *Queue[*waiter]
	free  time.Time // when what was let go is sent
	timer *time.Timer
}

type waiter struct {
	granted chan struct{}
	gone    bool // does not wait any more; guarded by Pacer.mu
}

// New returns a pacer of rate bytes per second; 0 does not limit, and nothing waits.
func New(rate float64, s Shares) *Pacer {
	return &Pacer{rate: rate, queue: NewQueue[*waiter](s)}
}

// Wait returns when n bytes of a class may be sent, or when ctx ends.
func (p *Pacer) Wait(ctx context.Context, c Class, n int) error {
	if p.rate <= 0 {
		return ctx.Err()
	}
	for ; n > slice; n -= slice {
		if err := p.waitSlice(ctx, c, slice); err != nil {
			return err
		}
	}
	return p.waitSlice(ctx, c, n)
}

func (p *Pacer) waitSlice(ctx context.Context, c Class, n int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w := &waiter{granted: make(chan struct{})}
	p.mu.Lock()
	p.queue.Push(c, n, w)
	p.grant(time.Now())
	p.mu.Unlock()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
		p.mu.Lock()
		w.gone = true
		p.mu.Unlock()
		return ctx.Err()
	}
}

// grant lets go what the rate allows now, and sees to it that it is called again. mu is held.
func (p *Pacer) grant(now time.Time) {
	for {
		if ahead := p.free.Sub(now); ahead > burst {
			if p.timer == nil {
				p.timer = time.AfterFunc(ahead-burst/2, func() {
					p.mu.Lock()
					defer p.mu.Unlock()
					p.timer = nil
					p.grant(time.Now())
				})
			}
			return
		}
		w, size, ok := p.queue.Pop()
		if !ok {
			return
		}
		if w.gone {
			continue
		}
		if p.free.Before(now) {
			p.free = now
		}
		p.free = p.free.Add(time.Duration(float64(size) / p.rate * float64(time.Second)))
		close(w.granted)
	}
}
