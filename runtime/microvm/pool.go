package microvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pool keeps machines of one shape, the one that was asked for last, in two
// stages: spawned, which is a monitor that waits for its state, and ready, which
// is a machine that ran, answered and stands still. It fills itself in the
// background, one machine at a time, to a size that follows demand.
type pool struct {
	r    *Runtime
	max  int
	wake chan struct{} // holds at most one wish to fill
	done chan struct{} // closed when the filler has ended
	ctx  context.Context
	end  context.CancelFunc

	mu      sync.Mutex
	shape   shape
	root    string
	spawned []pooled
	ready   []pooled
	claims  []time.Time // the last ones, oldest first; at most max
	made    int         // names the directories
}

// pooled is a machine of the pool.
type pooled struct {
	vm     *vm
	origin origin
}

const (
	// warmPrefix begins the names of directories and control groups of machines
	// in the pool. It is no part of a sandbox ID, so that adopt removes what is left.
	warmPrefix = "warm-"
	// spawnTimeout bounds the making of one.
	spawnTimeout = time.Minute
	// demandWindow is over how long claims count as demand.
	demandWindow = 10 * time.Second
	// lull is for how long nobody must have claimed before the pool is filled, so
	// that filling does not take the processor from those who claim; patience is
	// after how long it is filled nevertheless.
	lull, patience = 100 * time.Millisecond, 3 * time.Second
)

// poolSize is how many machines to keep ready: one, and one more for each that
// was claimed lately, up to a bound.
func poolSize(claims []time.Time, now time.Time, bound int) int {
	size := 1
	for _, at := range claims {
		if now.Sub(at) < demandWindow {
			size++
		}
	}
	return min(size, bound)
}

func newPool(r *Runtime, bound int) *pool {
	p := &pool{r: r, max: bound, wake: make(chan struct{}, 1), done: make(chan struct{})}
	p.ctx, p.end = context.WithCancel(context.Background())
	go p.fill()
	return p
}

// take moves a machine of the shape into dir and lets it run, or returns nil when
// there is none. From now on the pool keeps this shape. how names the stage that
// is wanted, empty for the best there is.
func (p *pool) take(ctx context.Context, want shape, root, dir, how string) (*vm, origin, error) {
	if p.max == 0 {
		return nil, origin{Shape: want}, nil
	}
	p.mu.Lock()
	var discard []pooled
	if p.shape != want || p.root != root {
		discard = append(p.spawned, p.ready...)
		p.shape, p.root, p.spawned, p.ready = want, root, nil, nil
	}
	p.claims = append(p.claims, time.Now())
	if len(p.claims) > p.max {
		p.claims = p.claims[1:]
	}
	var found pooled
	stage := ""
	for _, s := range []struct {
		name string
		list *[]pooled
	}{{StartPool, &p.ready}, {StartSpawned, &p.spawned}} {
		for stage == "" && len(*s.list) > 0 && (how == "" || how == s.name) {
			m := (*s.list)[0]
			*s.list = (*s.list)[1:]
			select {
			case <-m.vm.machine.Ended():
				discard = append(discard, m)
			default:
				found, stage = m, s.name
			}
		}
	}
	p.mu.Unlock()
	p.nudge()
	if len(discard) > 0 {
		go p.discard(discard)
	}
	if stage == "" {
		return nil, origin{Shape: want}, nil
	}
	return p.hand(ctx, found, stage, dir)
}

// hand gives a machine of the pool to a sandbox.
func (p *pool) hand(ctx context.Context, m pooled, stage, dir string) (*vm, origin, error) {
	if err := unix.Rename(m.vm.dir, dir); err != nil { // os.Rename refuses an empty directory
		go p.discard([]pooled{m})
		return nil, m.origin, err
	}
	m.vm.move(dir)
	if stage == StartSpawned {
		return m.vm, m.origin, m.vm.load(ctx, m.origin)
	}
	return m.vm, m.origin, m.vm.machine.Resume(ctx)
}

func (p *pool) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// fill makes machines until there are enough, each time that it is woken, and
// takes back some when demand has ceased.
func (p *pool) fill() {
	defer close(p.done)
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-again.C:
		case <-p.wake:
			if !p.awaitLull() {
				return
			}
		}
		for p.makeOne() {
		}
		p.shrink()
		again.Reset(demandWindow)
	}
}

// awaitLull returns when nobody claimed for a moment, or all the time; false when
// the pool ends.
func (p *pool) awaitLull() bool {
	end := time.NewTimer(patience)
	defer end.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return false
		case <-p.wake:
		case <-end.C:
			return true
		case <-time.After(lull):
			return true
		}
	}
}

// makeOne adds one machine to the stage that lacks one. It returns false when
// there are enough or when it failed.
func (p *pool) makeOne() (more bool) {
	p.mu.Lock()
	want, root := p.shape, p.root
	needReady := len(p.ready) < poolSize(p.claims, time.Now(), p.max)
	needSpawned := len(p.spawned) < 1
	p.made++
	name := fmt.Sprintf("%s%d-%d", warmPrefix, os.Getpid(), p.made)
	p.mu.Unlock()
	if !needReady && !needSpawned || p.ctx.Err() != nil || root == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(p.ctx, spawnTimeout)
	defer cancel()
	m, err := p.spawn(ctx, name, want, root, needReady)
	if err != nil {
		if p.ctx.Err() == nil {
			p.r.log.Warn("cannot make a machine ahead of time", "err", err)
		}
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.shape != want || p.root != root:
		go p.discard([]pooled{m})
	case needReady:
		p.ready = append(p.ready, m)
	default:
		p.spawned = append(p.spawned, m)
	}
	return true
}

// spawn makes a machine for the pool, up to the stage that is wanted.
func (p *pool) spawn(ctx context.Context, name string, s shape, root string, ready bool) (m pooled, err error) {
	dir := p.r.boxes.Path(name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return m, err
	}
	m.vm, m.origin, err = p.r.fork(ctx, dir, name, s, root)
	if err == nil && ready {
		err = m.vm.load(ctx, m.origin)
		if err == nil {
			err = m.vm.warmUp(ctx) // better it costs us than whoever claims it
		}
		if err == nil {
			err = m.vm.machine.Pause(ctx)
		}
		if err != nil {
			err = errors.Join(err, m.vm.End())
		}
	}
	if err != nil {
		return m, errors.Join(err, os.RemoveAll(dir))
	}
	return m, nil
}

// shrink takes back machines for which there is no demand any more.
func (p *pool) shrink() {
	p.mu.Lock()
	var discard []pooled
	if size := poolSize(p.claims, time.Now(), p.max); len(p.ready) > size {
		discard, p.ready = p.ready[size:], p.ready[:size:size]
	}
	p.mu.Unlock()
	p.discard(discard)
}

// discard ends machines that nobody will use.
func (p *pool) discard(list []pooled) {
	for _, m := range list {
		if err := m.vm.End(); err != nil {
			p.r.log.Error("cannot end a machine of the pool", "dir", m.vm.dir, "err", err)
			continue
		}
		_ = os.RemoveAll(m.vm.dir)
	}
}

// close ends the pool and all that is in it.
func (p *pool) close() {
	p.end()
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	p.discard(append(p.spawned, p.ready...))
	p.spawned, p.ready = nil, nil
}
