package node

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	// removeTimeout bounds the removal of one sandbox.
	removeTimeout = 30 * time.Second
	// recordsKept is how long the record of an ended sandbox can still be read.
	recordsKept = time.Hour
	// reasonRemoved is why a sandbox ended that somebody removed.
	reasonRemoved = "removed"
)

// Remove ends a sandbox and removes all that was made for it.
func (n *Node) Remove(ctx context.Context, ref string) error {
	const op = "node.Remove"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return err
	}
	defer e.op.unlock()
	if n.record(e).State == sandbox.Terminated {
		return sandbox.Errorf(op, sandbox.NotFound, ref, "it has ended already")
	}
	if rec := n.record(e); rec.Moving != "" && rec.Moving != arriving { // it may run there
		return sandbox.Errorf(op, sandbox.Conflict, rec.Name, "it is moving to node %s", rec.Moving).
			WithHint("end the move first, with `atoll migrate --resolve " + rec.Name + "` or `--abort`")
	}
	return n.end(e, reasonRemoved)
}

// end takes a sandbox through Terminating to Terminated. e.op is held. Once
// begun it does not stop because a caller went away.
func (n *Node) end(e *entry, reason string) error {
	ctx, stop := context.WithTimeout(context.Background(), removeTimeout)
	defer stop()
	rec := n.record(e)
	rec.State, rec.Reason, rec.Main = sandbox.Terminating, reason, rec.Main.ended(MainLost, 0, "its sandbox was removed")
	if err := n.save(ctx, e, rec); err != nil {
		// On a full disk, removing is what makes room. Should we die in between,
		// the next process finds a sandbox that is lost.
		n.log.Warn("removing a sandbox whose record cannot be written", "sandbox", rec.ID, "error", err)
	}
	if err := n.demolish(ctx, rec); err != nil {
		return err // the record says Terminating: reconciling tries again
	}
	n.mu.Lock()
	e.closeLocal()
	n.mu.Unlock()
	ended := time.Now().UTC()
	rec.State, rec.EndedAt, rec.Suspended, rec.Spec.Link = sandbox.Terminated, &ended, "", nil
	if rec.Lifecycle.Remove || rec.hidden() {
		if err := n.store.delete(ctx, kindSandbox, rec.ID); err != nil {
			return err
		}
		n.forget(e)
		n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventState, State: rec.State, Reason: reason})
		return nil
	}
	return n.save(ctx, e, rec)
}

// demolish removes a sandbox's machine, network and private snapshots. All its
// steps can be repeated.
func (n *Node) demolish(ctx context.Context, rec Sandbox) error {
	var errs []error
	if r, ok := n.runtimes[rec.Runtime]; ok {
		errs = append(errs, r.Destroy(ctx, rec.ID))
	}
	if n.cfg.Network != nil {
		errs = append(errs, n.cfg.Network.Detach(ctx, rec.ID))
	}
	if rec.Suspended != "" {
		errs = append(errs, n.dropSnapshot(rec.Suspended))
	}
	n.releaseParent(rec)
	return errors.Join(errs...)
}

// Pause stops a running sandbox so that it can go on later.
func (n *Node) Pause(ctx context.Context, ref string, mode PauseMode) (Sandbox, error) {
	const op = "node.Pause"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Sandbox{}, err
	}
	defer e.op.unlock()
	return n.pause(ctx, e, mode)
}

// pause is Pause with e.op held.
func (n *Node) pause(ctx context.Context, e *entry, mode PauseMode) (Sandbox, error) {
	const op = "node.Pause"
	rec := n.record(e)
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return Sandbox{}, err
	}
	if mode != PauseFrozen {
		return n.suspend(ctx, e, mode, "")
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return Sandbox{}, err
	}
	if err := r.Pause(ctx, rec.ID); err != nil {
		return Sandbox{}, err
	}
	now := time.Now().UTC()
	rec.State, rec.PausedAt = sandbox.Paused, &now
	return rec, n.save(ctx, e, rec)
}

// suspend stops a running sandbox with its state on disk; to is the node that it then leaves for, if any. e.op is held.
func (n *Node) suspend(ctx context.Context, e *entry, mode PauseMode, to string) (Sandbox, error) {
	rec := n.record(e)
	if err := mustBe("node.Pause", rec, sandbox.Running); err != nil {
		return Sandbox{}, err
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return Sandbox{}, err
	}
	now := time.Now().UTC()
	paused := rec
	paused.State, paused.PausedAt, paused.Moving = sandbox.Paused, &now, to
	// The machine goes only when its state is on disk and the record says so;
	// until then it stands still, so that nothing it does is lost.
	if r.Capabilities().Pause {
		if err := r.Pause(ctx, rec.ID); err != nil {
			return Sandbox{}, err
		}
	}
	take := n.takeSnapshot
	if mode == PauseFiles && r.Capabilities().Memory {
		take = n.takeFiles
	}
	snap, err := take(ctx, rec, Snapshot{Auto: autoPause})
	if err == nil {
		paused.Suspended, paused.Spec.Link, paused.Spec.Root = snap.ID, nil, snap.Source.Spec.Root
		if paused.Main = rec.Main.detached(); !snap.Memory {
			paused.Main = rec.Main.ended(MainLost, 0, "its sandbox was paused without its memory")
		}
		err = n.save(ctx, e, paused)
	}
	if err != nil {
		return Sandbox{}, errors.Join(err, n.thaw(ctx, r, rec, snap.ID))
	}
	n.mu.Lock()
	switch {
	case to != "": // whoever is connected to its ports stays so
		e.hangUp()
	case rec.Lifecycle.AutoResume: // its ports wait for traffic
		for _, l := range e.listeners {
			l.cut()
		}
		e.hangUp()
	default:
		e.closeLocal()
	}
	n.mu.Unlock()
	clean, stop := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer stop()
	if err := r.Destroy(clean, rec.ID); err != nil {
		n.log.Error("removing a paused sandbox's machine", "sandbox", rec.ID, "error", err)
	}
	if n.cfg.Network != nil {
		if err := n.cfg.Network.Detach(clean, rec.ID); err != nil {
			n.log.Error("removing a paused sandbox's network", "sandbox", rec.ID, "error", err)
		}
	}
	return paused, nil
}

// thaw lets a sandbox go on whose pause failed, and drops the snapshot, if there
// is one.
func (n *Node) thaw(ctx context.Context, r sandbox.Runtime, rec Sandbox, snap string) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer stop()
	var errs []error
	if r.Capabilities().Pause {
		errs = append(errs, r.Resume(ctx, rec.ID))
	}
	if snap != "" {
		errs = append(errs, n.dropSnapshot(snap))
	}
	return errors.Join(errs...)
}

// Resume lets a paused sandbox go on; one that runs is left as it is.
func (n *Node) Resume(ctx context.Context, ref string) (Sandbox, error) {
	e, err := n.lock(ctx, "node.Resume", ref)
	if err != nil {
		return Sandbox{}, err
	}
	defer e.op.unlock()
	sb, _, err := n.resume(ctx, e)
	return sb, err
}

// resume is Resume with e.op held; it reports whether the sandbox was paused.
func (n *Node) resume(ctx context.Context, e *entry) (Sandbox, bool, error) {
	const op = "node.Resume"
	rec := n.record(e)
	if rec.State == sandbox.Running {
		return rec, false, nil
	}
	if err := mustBe(op, rec, sandbox.Paused); err != nil {
		return Sandbox{}, false, err
	}
	if err := mustStay(op, rec); err != nil {
		return Sandbox{}, false, err
	}
	return n.wake(ctx, e)
}

// mustStay fails with Conflict for a sandbox that stands still on its way to another node.
func mustStay(op string, rec Sandbox) error {
	if rec.Moving == "" || rec.State == sandbox.Running {
		return nil
	}
	return sandbox.Errorf(op, sandbox.Conflict, rec.Name, "it is moving to node %s", rec.Moving).
		WithHint("`atoll migrate --resolve " + rec.Name + "` asks that node how the move went; `atoll node ls` shows whether it answers")
}

// wake lets a paused sandbox go on, whatever its record says of a move. e.op is held.
func (n *Node) wake(ctx context.Context, e *entry) (Sandbox, bool, error) {
	rec := n.record(e)
	now := time.Now().UTC()
	running := rec
	running.State, running.PausedAt, running.Suspended, running.Moving = sandbox.Running, nil, "", ""
	running.EndAt = deadline(now, rec.Lifecycle.Timeout)
	if rec.Suspended == "" {
		r, err := n.Runtime(rec.Runtime)
		if err == nil {
			err = r.Resume(ctx, rec.ID)
		}
		if err != nil {
			return Sandbox{}, false, err
		}
		return running, true, n.save(ctx, e, running)
	}
	running.StartedAt, running.Moving = now, rec.Moving // the guest is told that it goes on
	if err := n.start(ctx, e, &running, source{snap: rec.Suspended}); err != nil {
		// It stays paused: its snapshot is untouched.
		n.undoStart(e, rec)
		return Sandbox{}, false, err
	}
	running.Moving = ""
	if err := n.save(ctx, e, running); err != nil {
		n.undoStart(e, rec)
		return Sandbox{}, false, err
	}
	n.followMain(e)
	if err := n.dropSnapshot(rec.Suspended); err != nil {
		n.log.Error("removing a resumed sandbox's snapshot", "snapshot", rec.Suspended, "error", err)
	}
	return running, true, nil
}

// undoStart removes what a failed resume made, keeping the record and snapshot.
func (n *Node) undoStart(e *entry, rec Sandbox) {
	ctx, stop := context.WithTimeout(context.Background(), removeTimeout)
	defer stop()
	n.mu.Lock()
	e.closeLocal()
	n.mu.Unlock()
	rec.Suspended = ""
	if err := n.demolish(ctx, rec); err != nil {
		n.log.Error("undoing a failed resume", "sandbox", rec.ID, "error", err)
	}
}

// Connect resumes the sandbox if it is paused and sees that it lives for at
// least timeout from now. It never shortens a life.
func (n *Node) Connect(ctx context.Context, ref string, timeout time.Duration) (sb Sandbox, resumed bool, err error) {
	e, err := n.lock(ctx, "node.Connect", ref)
	if err != nil {
		return Sandbox{}, false, err
	}
	defer e.op.unlock()
	sb, resumed, err = n.resume(ctx, e)
	if err != nil {
		return Sandbox{}, false, err
	}
	until := deadline(time.Now().UTC(), timeout)
	if until == nil || sb.EndAt == nil && !resumed || sb.EndAt != nil && !until.After(*sb.EndAt) && !resumed {
		return sb, resumed, nil
	}
	sb.EndAt = until
	return sb, resumed, n.save(ctx, e, sb)
}

// SetTimeout makes the sandbox end (or pause) d from now; zero lets it live
// until it is removed.
func (n *Node) SetTimeout(ctx context.Context, ref string, d time.Duration) error {
	return n.change(ctx, "node.SetTimeout", ref, func(rec *Sandbox) error {
		if rec.State != sandbox.Running && rec.State != sandbox.Paused {
			return mustBe("node.SetTimeout", *rec, sandbox.Running)
		}
		rec.Lifecycle.Timeout = d
		rec.EndAt = deadline(time.Now().UTC(), d)
		return nil
	})
}

// Rename gives the sandbox another name.
func (n *Node) Rename(ctx context.Context, ref, name string) error {
	const op = "node.Rename"
	if !nameOK(name) {
		return sandbox.Errorf(op, sandbox.Invalid, name, "a name has up to 63 letters, digits, '-', '_' or '.', and begins with a letter or digit")
	}
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return err
	}
	defer e.op.unlock()
	rec := n.record(e)
	old := rec.Name
	if old == name {
		return nil
	}
	n.mu.Lock()
	_, taken := n.names[name]
	if !taken {
		n.names[name] = rec.ID // both are its names until the record is safe
	}
	n.mu.Unlock()
	if taken {
		return sandbox.Errorf(op, sandbox.Exists, name, "the name is in use")
	}
	rec.Name = name
	unused := old
	if err = n.save(ctx, e, rec); err != nil {
		unused = name
	}
	n.mu.Lock()
	delete(n.names, unused)
	n.mu.Unlock()
	return err
}

// UpdateNetwork replaces the policy of a sandbox, at once when it runs.
func (n *Node) UpdateNetwork(ctx context.Context, ref string, p sandbox.NetworkPolicy) error {
	const op = "node.UpdateNetwork"
	return n.change(ctx, op, ref, func(rec *Sandbox) error {
		if rec.Spec.Network != sandbox.NetworkSandbox {
			return sandbox.Errorf(op, sandbox.Unsupported, rec.Name, "its network mode is %s, which has no policy", rec.Spec.Network)
		}
		if rec.Spec.Link != nil {
			if err := n.cfg.Network.Update(ctx, rec.ID, p); err != nil {
				return err
			}
		}
		rec.Policy = p
		return nil
	})
}

// change applies fn to a copy of a sandbox's record and saves it.
func (n *Node) change(ctx context.Context, op, ref string, fn func(*Sandbox) error) error {
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if err := fn(&rec); err != nil {
		return err
	}
	return n.save(ctx, e, rec)
}

// mustBe fails with Conflict unless the record is in the state.
func mustBe(op string, rec Sandbox, want sandbox.State) error {
	if rec.State == want {
		return nil
	}
	hint := ""
	switch rec.State {
	case sandbox.Paused:
		hint = "resume it first: `atoll resume " + rec.Name + "`"
	case sandbox.Error:
		hint = "it was lost: " + rec.Reason
	}
	return sandbox.Errorf(op, sandbox.Conflict, rec.Name, "it is %s, not %s", rec.State, want).WithHint(hint)
}

// Stats reads what a sandbox uses now.
func (n *Node) Stats(ctx context.Context, ref string) (sandbox.Stats, error) {
	const op = "node.Stats"
	e, err := n.find(op, ref)
	if err != nil {
		return sandbox.Stats{}, err
	}
	return n.stats(ctx, op, n.record(e))
}

func (n *Node) stats(ctx context.Context, op string, rec Sandbox) (sandbox.Stats, error) {
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return sandbox.Stats{}, err
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return sandbox.Stats{}, err
	}
	return r.Stats(ctx, rec.ID)
}

// History returns the samples of the last hour at most, oldest first.
func (n *Node) History(ref string) []sandbox.Stats {
	e, err := n.find("node.History", ref)
	if err != nil {
		return nil
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	return append([]sandbox.Stats(nil), e.samples...)
}

// Guest returns a client of the sandbox's guest that carries its token. Calls
// through it resume a sandbox that resumes on traffic. Do not close it.
func (n *Node) Guest(_ context.Context, ref string) (*guest.Client, error) {
	e, err := n.find("node.Guest", ref)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.client == nil {
		id := e.rec.ID
		dial := func(ctx context.Context) (net.Conn, error) { return n.Dial(ctx, id, sandbox.GuestPort) }
		e.client = guest.New(dial, guest.Options{Token: e.rec.GuestToken})
	}
	return e.client, nil
}
