package node

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// busyShare is the share of one processor from which on a sandbox counts as busy
// though nobody is connected to it.
const busyShare = 0.05

// usage is who uses a sandbox that is paused when nobody does. Node.mu guards it.
type usage struct {
	open   int           // connections from outside
	dozing bool          // it is being paused: who comes now waits for that
	looked time.Time     // when it was looked at last; zero: not since it runs
	cpu    time.Duration // what it had consumed then
	last   time.Time     // when it was seen in use
}

// look takes in what the sandbox consumed by now, and reports whether it has been
// idle for so long.
func (u *usage) look(cpu time.Duration, now time.Time, idle time.Duration) bool {
	used := float64(cpu-u.cpu) > busyShare*float64(now.Sub(u.looked))
	if u.open > 0 || u.looked.IsZero() || used {
		u.last = now
	}
	u.looked, u.cpu = now, cpu
	return u.open == 0 && now.Sub(u.last) >= idle
}

// enter notes a connection to a sandbox, until leave is called. The record is
// that of the sandbox from when on it is not paused under the connection, unless
// it is dozing already.
func (n *Node) enter(e *entry) (rec Sandbox, dozing bool, leave func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.rec.Lifecycle.Idle == 0 {
		return e.rec, false, func() {}
	}
	e.usage.open++
	return e.rec, e.usage.dozing, sync.OnceFunc(func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		e.usage.open--
		e.usage.last = time.Now()
	})
}

// visit is a connection that counts as use of its sandbox until it is closed.
type visit struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (v *visit) Close() error {
	v.leave()
	return v.Conn.Close()
}

// CloseWrite says that nothing more will be written, where the connection can.
func (v *visit) CloseWrite() error {
	if half, ok := v.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// sampled keeps a sample of what a sandbox uses, and pauses it when it is idle.
func (n *Node) sampled(ctx context.Context, id string, s sandbox.Stats) {
	n.mu.Lock()
	e := n.entries[id]
	if e == nil {
		n.mu.Unlock()
		return
	}
	if len(e.samples) == samplesKept {
		e.samples = append(e.samples[:0], e.samples[1:]...)
	}
	e.samples = append(e.samples, s)
	client, idle := e.client, e.rec.Lifecycle.Idle
	n.mu.Unlock()
	if idle == 0 {
		return
	}
	if client != nil {
		client.CloseIdle() // they are our own, and nobody's use of it
	}
	n.mu.Lock()
	rest := e.usage.look(s.CPU, time.Now(), idle)
	n.mu.Unlock()
	if rest {
		n.doze(ctx, e)
	}
}

// doze pauses a sandbox that nobody uses, unless somebody has come.
func (n *Node) doze(ctx context.Context, e *entry) {
	if !e.op.tryLock() {
		return
	}
	defer e.op.unlock()
	n.mu.Lock()
	rec := e.rec
	if rec.State != sandbox.Running || e.usage.open > 0 {
		n.mu.Unlock()
		return
	}
	e.usage.dozing = true
	n.mu.Unlock()
	err := n.rest(ctx, e, rec)
	n.mu.Lock()
	e.usage.dozing, e.usage.looked = false, time.Time{}
	n.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventError, State: rec.State, Reason: "pausing it because it is idle: " + err.Error()})
	}
}

// rest pauses a sandbox on disk, which gives its memory back; or in memory where
// the runtime saves no memory, and when the disk is full. e.op is held.
func (n *Node) rest(ctx context.Context, e *entry, rec Sandbox) error {
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return err
	}
	caps := r.Capabilities()
	if caps.Snapshot && caps.Memory {
		if _, err = n.pause(ctx, e, PauseDisk); err == nil {
			return nil
		}
	}
	if caps.Pause {
		_, inMemory := n.pause(ctx, e, PauseFrozen)
		if inMemory == nil {
			return nil
		}
		err = errors.Join(err, inMemory)
	}
	return err
}

// canRest reports whether a runtime can pause sandboxes that are idle.
func canRest(c sandbox.Capabilities) bool { return c.Pause || c.Snapshot && c.Memory }
