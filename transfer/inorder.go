package transfer

import (
	"context"
	"runtime"
)

// A pipeline runs jobs at once and takes their results in the order of submission, so that what comes out does not
// depend on the number of processors. At most GOMAXPROCS jobs and results are under way.
type pipeline[T any] struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	queue  chan chan outcome[T] // closed by close
	done   chan struct{}        // closed when all results are taken
}

type outcome[T any] struct {
	value T
	err   error
}

// newPipeline returns a pipeline whose results go to take, one at a time, on a goroutine of its own. The first error of a
// job, of take or of ctx ends it. close must be called.
func newPipeline[T any](ctx context.Context, take func(T) error) *pipeline[T] {
	p := &pipeline[T]{queue: make(chan chan outcome[T], max(1, runtime.GOMAXPROCS(0)-1)), done: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	go func() {
		defer close(p.done)
		for future := range p.queue {
			o := <-future // jobs are finite: none waits for another
			if p.ctx.Err() != nil {
				continue
			}
			if o.err == nil {
				o.err = take(o.value)
			}
			if o.err != nil {
				p.cancel(o.err)
			}
		}
	}()
	return p
}

// submit starts a job, and waits while too many are under way. It returns the error that ended the pipeline.
func (p *pipeline[T]) submit(job func() (T, error)) error {
	future := make(chan outcome[T], 1)
	select {
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	case p.queue <- future:
	}
	go func() {
		v, err := job()
		future <- outcome[T]{v, err}
	}()
	return nil
}

// close waits until all results are taken, or dropped after an error, which it returns.
func (p *pipeline[T]) close() error {
	close(p.queue)
	<-p.done
	err := context.Cause(p.ctx)
	p.cancel(nil)
	return err
}

// abort ends the pipeline early for a reason, which must not be nil, and waits for its jobs.
func (p *pipeline[T]) abort(reason error) {
	p.cancel(reason)
	_ = p.close() // the reason, which the caller has
}
