package node

import (
	"context"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// autoMove marks snapshots by which a sandbox moves to another node.
const autoMove = "move"

// Checkpoint saves the state of a running sandbox, which goes on, for a move.
func (n *Node) Checkpoint(ctx context.Context, ref string) (Snapshot, error) {
	const op = "node.Checkpoint"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return Snapshot{}, err
	}
	return n.takeSnapshot(ctx, rec, Snapshot{Auto: autoMove})
}

// Depart stops a running sandbox with its state on disk and notes that it leaves for another node. From then on it does not
// run here until Stay, even when this process is killed.
func (n *Node) Depart(ctx context.Context, ref, to string) (Snapshot, error) {
	const op = "node.Depart"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.Moving != to || rec.Suspended == "" { // else it was stopped by a call whose answer was lost
		if rec, err = n.pause(ctx, e, PauseDisk); err != nil {
			return Snapshot{}, err
		}
		rec.Moving = to
		if err := n.save(ctx, e, rec); err != nil {
			return Snapshot{}, err
		}
	}
	return n.GetSnapshot(ctx, rec.Suspended)
}

// Stay lets a sandbox go on that did not leave after all. One that runs is left as it is.
func (n *Node) Stay(ctx context.Context, ref string) (Sandbox, error) {
	e, err := n.lock(ctx, "node.Stay", ref)
	if err != nil {
		return Sandbox{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.Moving != "" {
		rec.Moving = ""
		if err := n.save(ctx, e, rec); err != nil {
			return Sandbox{}, err
		}
	}
	sb, _, err := n.resume(ctx, e)
	return sb, err
}

// Left removes a sandbox that runs on another node now. One that is gone is no error.
func (n *Node) Left(ctx context.Context, ref, to string) error {
	e, err := n.lock(ctx, "node.Left", ref)
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer e.op.unlock()
	if rec := n.record(e); rec.State == sandbox.Terminated || rec.Moving == "" {
		return nil
	}
	return n.end(e, "moved to node "+to)
}

// Arrive starts a sandbox that comes from another node, as itself, from the snapshot of its state.
func (n *Node) Arrive(ctx context.Context, snap string) (Sandbox, error) {
	const op = "node.Arrive"
	s, err := n.GetSnapshot(ctx, snap)
	if err != nil {
		return Sandbox{}, err
	}
	rec := s.Source
	if sb, err := n.Get(ctx, rec.ID); err == nil && live(sb.State) {
		return Sandbox{}, sandbox.Errorf(op, sandbox.Exists, rec.ID, "a sandbox with this ID is here")
	}
	rec.State, rec.Reason, rec.Moving, rec.Suspended, rec.Pooled = sandbox.Creating, "", "", "", ""
	rec.StartedAt, rec.PausedAt, rec.Spec.Link, rec.Parent = time.Now().UTC(), nil, nil, s.Parent
	rec.Main = rec.Main.detached()
	return n.launch(ctx, rec, s.ID)
}

// Leaving lists the sandboxes whose move was under way when the node stopped.
func (n *Node) Leaving() []Sandbox {
	return n.records(func(r Sandbox) bool { return r.Moving != "" && live(r.State) })
}

// DropCopies removes the snapshots by which a sandbox was moved, unless it needs them.
func (n *Node) DropCopies(id string) {
	for _, m := range n.cfg.Snapshots.List() {
		s, err := fromManifest(m)
		if err != nil || m.Sandbox != id || s.Auto != autoMove && s.Auto != autoPause || n.neededBy(m.ID) != "" {
			continue
		}
		if err := n.dropSnapshot(m.ID); err != nil {
			n.log.Error("removing the copy of a moved sandbox", "snapshot", m.ID, "error", err)
		}
	}
}
