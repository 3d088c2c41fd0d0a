package tensor

import (
	"sync"
	"sync/atomic"
)

// A Pool is the threads that compute together. Workers sleep until there is work and never wait in a loop, so that other work
// on the machine is not disturbed, nor disturbs more than it must: whoever is free takes the next piece. Several goroutines
// may use one Pool.
type Pool struct {
	isa     ISA             // for products
	wake    []chan *section // one for each worker beside the caller
	closed  sync.Once
	idle    sync.WaitGroup
	tiles   sync.Pool // of *attendTile
	scratch sync.Pool // of *tileScratch
}

// A section is one parallel loop.
type section struct {
	f     func(lo, hi int)
	n     int
	chunk int
	next  atomic.Int64 // first index that nobody has taken
	left  atomic.Int64 // indices that are not done
	done  chan struct{}
}

// NewPool returns a pool of that many threads, the caller's included, that uses the given instructions; see Best. Close ends it.
func NewPool(threads int, isa ISA) *Pool {
	p := &Pool{isa: isa, wake: make([]chan *section, max(threads, 1)-1)}
	for i := range p.wake {
		p.wake[i] = make(chan *section, 1)
		p.idle.Add(1)
		go func() {
			defer p.idle.Done()
			for s := range p.wake[i] {
				s.work()
			}
		}()
	}
	return p
}

// Threads returns how many threads compute together.
func (p *Pool) Threads() int { return len(p.wake) + 1 }

// Close ends the workers. The pool must not be used any more, nor be in use.
func (p *Pool) Close() {
	p.closed.Do(func() {
		for _, w := range p.wake {
			close(w)
		}
	})
	p.idle.Wait()
}

// Run calls f for ranges that make up 0 to n, by several threads at once, and returns when all is done. Ranges are multiples
// of grain, but for the last.
func (p *Pool) Run(n, grain int, f func(lo, hi int)) {
	if len(p.wake) == 0 || n <= grain {
		if n > 0 {
			f(0, n)
		}
		return
	}
	// Eight ranges a thread: fine enough that a thread which lost its CPU for a while does not hold up the others for long.
	chunk := max(grain, (n/(p.Threads()*8)+grain-1)/grain*grain)
	s := &section{f: f, n: n, chunk: chunk, done: make(chan struct{}, 1)}
	s.left.Store(int64(n))
	for _, w := range p.wake[:min(len(p.wake), (n+chunk-1)/chunk-1)] {
		select {
		case w <- s:
		default: // busy with another caller's section; the rest of us do it
		}
	}
	s.work()
	if s.left.Load() != 0 {
		<-s.done
	}
}

// work takes ranges until none is left. Whoever finishes the last one says so.
func (s *section) work() {
	for {
		lo := int(s.next.Add(int64(s.chunk))) - s.chunk
		if lo >= s.n {
			return
		}
		hi := min(lo+s.chunk, s.n)
		s.f(lo, hi)
		if s.left.Add(int64(lo-hi)) == 0 {
			s.done <- struct{}{}
		}
	}
}
