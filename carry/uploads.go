package carry

import (
	"context"
	"sync"
)

// uploads runs a bounded number of jobs at once; the first that fails ends the context.
type uploads struct {
	cancel context.CancelCauseFunc
	slots  chan struct{}
	wg     sync.WaitGroup
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
