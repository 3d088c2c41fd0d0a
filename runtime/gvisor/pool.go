package gvisor

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// pool keeps sentries that are booted and wait for their orders. A sentry is
// told at boot what it is made of, so the pool holds one shape only: the one that
// was asked for last. It refills itself in the background, one at a time.
type pool struct {
	r    *Runtime
	size int
	wake chan struct{} // holds at most one wish to refill
	done chan struct{} // closed when the filler has ended
	ctx  context.Context
	end  context.CancelFunc

	mu    sync.Mutex
	shape shape
	ready []*sentry // all of shape
	made  int       // names the directories
}

// shape is what a booted sentry cannot change any more.
type shape struct {
	root   string
	images images
	res    sandbox.Resources
}

// warmPrefix begins the names of directories and control groups of sentries in
// the pool. It is no part of a sandbox ID, so that adopt removes what is left.
const warmPrefix = "warm-"

// bootTimeout bounds the boot of a sentry for the pool.
const bootTimeout = 30 * time.Second

func newPool(r *Runtime, size int) *pool {
	p := &pool{r: r, size: size, wake: make(chan struct{}, 1), done: make(chan struct{})}
	p.ctx, p.end = context.WithCancel(context.Background())
	go p.fill()
	return p
}

// take returns a booted sentry of the shape, or nil. From now on the pool keeps
// this shape.
func (p *pool) take(want shape) *sentry {
	if p.size == 0 {
		return nil
	}
	p.mu.Lock()
	var s *sentry
	var discard []*sentry
	if p.shape != want {
		p.shape, discard, p.ready = want, p.ready, nil
	}
	for s == nil && len(p.ready) > 0 {
		s, p.ready = p.ready[0], p.ready[1:]
		if s.proc.Dead() {
			s, discard = nil, append(discard, s)
		}
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
	if len(discard) > 0 {
		go p.discard(discard)
	}
	return s
}

// fill boots sentries until there are enough, each time that it is woken.
func (p *pool) fill() {
	defer close(p.done)
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.wake:
		}
		for p.bootOne() {
		}
	}
}

// bootOne adds one sentry. It returns false when there are enough or when it failed.
func (p *pool) bootOne() (more bool) {
	p.mu.Lock()
	want, enough := p.shape, len(p.ready) >= p.size
	p.made++
	name := fmt.Sprintf("%s%d-%d", warmPrefix, os.Getpid(), p.made)
	p.mu.Unlock()
	if enough || p.ctx.Err() != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(p.ctx, bootTimeout)
	defer cancel()
	dir := p.r.boxes.Path(name)
	err := os.Mkdir(dir, 0o700)
	var s *sentry
	if err == nil {
		s, err = p.r.boot(ctx, dir, name, want, nil)
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		if p.ctx.Err() == nil {
			p.r.log.Warn("cannot boot a sentry ahead of time", "err", err)
		}
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shape != want {
		go p.discard([]*sentry{s})
		return true
	}
	p.ready = append(p.ready, s)
	return true
}

// discard ends sentries that nobody will use.
func (p *pool) discard(list []*sentry) {
	for _, s := range list {
		if err := s.End(); err != nil {
			p.r.log.Error("cannot end a sentry of the pool", "dir", s.dir, "err", err)
			continue
		}
		_ = os.RemoveAll(s.dir)
	}
}

// close ends the pool and all that is in it.
func (p *pool) close() {
	p.end()
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	p.discard(p.ready)
	p.ready = nil
}
