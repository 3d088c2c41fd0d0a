package node

import (
	"context"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// reconcileLoop compares intent with reality every so often, at each sandbox's
// deadline, and when asked.
func (n *Node) reconcileLoop(ctx context.Context) {
	defer n.done.Done()
	full := time.NewTicker(reconcileEvery)
	defer full.Stop()
	due := time.NewTimer(time.Hour)
	defer due.Stop()
	for {
		wait := time.Hour
		if at := nextDue(n.records(func(Sandbox) bool { return true })); !at.IsZero() {
			wait = time.Until(at)
		}
		due.Reset(max(wait, 0))
		select {
		case <-ctx.Done():
			return
		case <-n.kick: // a deadline moved: sleep anew
		case <-due.C:
			n.expire(ctx)
		case <-full.C:
			n.reconcile(ctx)
			n.forgetEnded(ctx, recordsKept, func(string) {})
			n.expireSnapshots(n.cfg.Retention)
		}
	}
}

// reconcile looks at everything.
func (n *Node) reconcile(ctx context.Context) {
	seen := make(observed)
	for name, r := range n.runtimes {
		list, err := r.List(ctx)
		if err != nil {
			n.log.Error("listing a runtime's sandboxes", "runtime", name, "error", err)
			continue
		}
		seen[name] = make(map[string]sandbox.Status, len(list))
		for _, s := range list {
			seen[name][s.ID] = s
		}
	}
	n.carryOut(ctx, seen)
}

// expire looks only at deadlines, which needs no runtime.
func (n *Node) expire(ctx context.Context) { n.carryOut(ctx, observed{}) }

func (n *Node) carryOut(ctx context.Context, seen observed) {
	records := n.records(func(Sandbox) bool { return true })
	// Several at once: one sandbox that is slow to go must not hold up the rest.
	_ = each(plan(records, seen, n.busy, time.Now()), func(a action) error {
		if err := n.apply(ctx, a, seen); err != nil {
			n.log.Error("reconciling", "sandbox", a.id, "action", a.kind, "error", err)
		}
		return nil // logged; the next round tries again
	})
}

// busy reports whether an operation on the sandbox is under way.
func (n *Node) busy(id string) bool {
	n.mu.RLock()
	e := n.entries[id]
	n.mu.RUnlock()
	if e == nil {
		return false
	}
	if !e.op.tryLock() {
		return true
	}
	e.op.unlock()
	return false
}

// apply carries out one action, unless the sandbox has changed since it was
// planned.
func (n *Node) apply(ctx context.Context, a action, seen observed) error {
	n.mu.RLock()
	e := n.entries[a.id]
	n.mu.RUnlock()
	if e == nil && a.kind == actOrphan {
		return n.runtimes[a.runtime].Destroy(ctx, a.id)
	}
	if e == nil || !e.op.tryLock() {
		return nil
	}
	defer e.op.unlock()
	rec := n.record(e)
	if a.kind == actOrphan {
		if hasMachine(rec) { // made since the runtime was asked
			return nil
		}
		return n.runtimes[a.runtime].Destroy(ctx, a.id)
	}
	if now, ok := planOne(rec, seen, time.Now()); !ok || now.kind != a.kind {
		return nil
	}
	switch a.kind {
	case actLose:
		// The runtime was asked before we held op; ask again, or a sandbox made
		// in between would be taken for lost.
		if reason, lost := n.gone(ctx, rec); lost {
			return n.lose(ctx, e, reason)
		}
	case actDiscard:
		if rec.State == sandbox.Terminating {
			return n.end(e, rec.Reason)
		}
		n.discard(e)
	case actKill:
		return n.end(e, a.reason)
	case actPause:
		return n.pauseInTime(ctx, e, rec)
	case actAdopt:
		if rec.State == sandbox.Running && seen[rec.Runtime][rec.ID].State == sandbox.Paused {
			// A daemon was killed after it had stopped the sandbox and before that was on record.
			if err := n.runtimes[rec.Runtime].Resume(ctx, rec.ID); err != nil {
				return err
			}
		}
		n.adoptPorts(e, rec)
		n.followMain(e)
	}
	return nil
}

// pauseInTime pauses a sandbox whose time is up: on disk, or in memory when that
// fails, as on a full disk. It is never ended instead: its owner asked for it to
// be kept. When neither works it is tried again later. e.op is held.
func (n *Node) pauseInTime(ctx context.Context, e *entry, rec Sandbox) error {
	mode := PauseDisk
	if rec.Lifecycle.OnTimeout == TimeoutShelve {
		mode = PauseFiles
	}
	_, err := n.pause(ctx, e, mode)
	if err == nil {
		return nil
	}
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventError, State: rec.State, Reason: "pausing at its time-out: " + err.Error()})
	if _, inMemory := n.pause(ctx, e, PauseFrozen); inMemory == nil {
		return nil
	}
	again := time.Now().UTC().Add(reconcileEvery)
	rec.EndAt = &again
	n.mu.Lock()
	e.rec = rec // in memory only: the disk may be what is at fault
	n.mu.Unlock()
	return err
}

// gone asks the runtime itself whether a sandbox has died.
func (n *Node) gone(ctx context.Context, rec Sandbox) (reason string, lost bool) {
	list, err := n.runtimes[rec.Runtime].List(ctx)
	if err != nil {
		return "", false
	}
	for _, s := range list {
		if s.ID == rec.ID {
			return s.Reason, s.State == sandbox.Error
		}
	}
	return "the machine is gone", true
}

// lose records that a sandbox's machine is no more and removes its remains, or
// makes it anew if it asked for that. A pooled one is simply removed. e.op is held.
func (n *Node) lose(ctx context.Context, e *entry, reason string) error {
	rec := n.record(e)
	if rec.hidden() {
		nudge(n.poolKick)
		return n.end(e, reason)
	}
	again, anew := restarted(rec, time.Now().UTC())
	rec.State, rec.Reason, rec.EndAt, rec.Main = sandbox.Error, reason, nil, rec.Main.ended(MainLost, 0, "its sandbox was lost")
	if err := n.save(ctx, e, rec); err != nil {
		return err
	}
	n.mu.Lock()
	e.closeLocal()
	n.mu.Unlock()
	if err := n.demolish(ctx, rec); err != nil {
		return err
	}
	switch {
	case anew:
		return n.restart(ctx, e, again, reason)
	case rec.Lifecycle.Remove:
		return n.end(e, reason)
	}
	return nil
}

// adoptPorts publishes a running sandbox's ports again after a restart.
func (n *Node) adoptPorts(e *entry, rec Sandbox) {
	for _, p := range rec.Ports {
		n.mu.RLock()
		_, open := e.listeners[p.Guest]
		n.mu.RUnlock()
		if open {
			continue
		}
		if _, err := n.openPort(e, rec.ID, p); err != nil {
			n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventError, State: rec.State, Reason: err.Error()})
		}
	}
}

// watchLoop takes in what a runtime reports by itself.
func (n *Node) watchLoop(ctx context.Context, r sandbox.Runtime) {
	defer n.done.Done()
	for ev := range r.Watch(ctx) {
		n.mu.RLock()
		e := n.entries[ev.Sandbox]
		n.mu.RUnlock()
		if e == nil {
			continue
		}
		if ev.State != sandbox.Error {
			if ev.Kind != sandbox.EventState { // states are the node's to tell
				n.emit(ev)
			}
			continue
		}
		// An operation may be under way, for long; other events must not wait.
		n.done.Go(func() {
			if err := e.op.lock(ctx); err != nil {
				return
			}
			defer e.op.unlock()
			rec := n.record(e)
			if rec.Suspended != "" || rec.State != sandbox.Running && rec.State != sandbox.Paused {
				return
			}
			if err := n.lose(ctx, e, ev.Reason); err != nil {
				n.log.Error("recording a lost sandbox", "sandbox", rec.ID, "error", err)
			}
		})
	}
}

// sampleLoop reads what running sandboxes use, for History and to pause idle ones.
func (n *Node) sampleLoop(ctx context.Context) {
	defer n.done.Done()
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.sample(ctx)
	}
}

// sample reads what every running sandbox uses.
func (n *Node) sample(ctx context.Context) {
	running := n.records(func(r Sandbox) bool { return r.State == sandbox.Running && !r.hidden() })
	_ = each(running, func(r Sandbox) error {
		s, err := n.stats(ctx, "node.sample", r)
		if err != nil {
			return nil // it has just gone; nothing to sample
		}
		n.sampled(ctx, r.ID, s)
		return nil
	})
}

// forgetEnded drops the records of sandboxes that ended at least age ago; those of sandboxes that live on elsewhere are kept
// longer.
func (n *Node) forgetEnded(ctx context.Context, age time.Duration, dropped func(id string)) {
	old := n.records(func(r Sandbox) bool {
		return r.State == sandbox.Terminated && r.EndedAt != nil && time.Since(*r.EndedAt) >= age && r.Moved == ""
	})
	old = append(old, n.staleMoves(time.Now())...)
	for _, r := range old {
		n.mu.RLock()
		e := n.entries[r.ID]
		n.mu.RUnlock()
		if e == nil || !e.op.tryLock() {
			continue
		}
		if err := n.store.delete(ctx, kindSandbox, r.ID); err == nil {
			n.forget(e)
			dropped(r.ID)
		}
		e.op.unlock()
	}
}

// sweepInternal removes the sandboxes of builds that a former process ran.
func (n *Node) sweepInternal() {
	for _, r := range n.records(func(r Sandbox) bool { return r.Internal }) {
		if err := n.Remove(context.Background(), r.ID); err != nil {
			n.log.Error("removing a former build's sandbox", "sandbox", r.ID, "error", err)
		}
	}
}

// sweepNetwork removes attachments that belong to no sandbox that lives.
func (n *Node) sweepNetwork() {
	if n.cfg.Network == nil {
		return
	}
	keep := make(map[string]bool)
	for _, r := range n.records(func(r Sandbox) bool { return r.Spec.Link != nil && live(r.State) && r.State != sandbox.Error }) {
		keep[r.ID] = true
	}
	if err := n.cfg.Network.Sweep(keep); err != nil {
		n.log.Error("removing left-over network attachments", "error", err)
	}
}
