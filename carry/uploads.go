package carry

import (
	"context"
	"sync"
	"time"
)

// uploads runs a bounded number of jobs at once; the first that fails ends the context.
type uploads struct {
	cancel context.CancelCauseFunc
	slots  chan struct{}
	wg     sync.WaitGroup

	mu   sync.Mutex
	last time.Time // when a job ended last
}

// start prepares for at most n jobs at once.
func (u *uploads) start(cancel context.CancelCauseFunc, n int) {
	u.cancel, u.slots = cancel, make(chan struct{}, max(n, 1))
}

// run starts a job, and waits while too many are under way.
func (u *uploads) run(ctx context.Context, job func() error) error {
	select {
	case u.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	u.wg.Go(func() {
		defer func() { <-u.slots }()
		if err := job(); err != nil {
			u.cancel(err)
		}
	})
	return nil
}

func (u *uploads) wait() { u.wg.Wait() }

// span is the time that a job which ends now adds to that of all jobs together.
func (u *uploads) span(began time.Time) time.Duration {
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last.After(began) {
		began = u.last
	}
	u.last = now
	return now.Sub(began)
}
