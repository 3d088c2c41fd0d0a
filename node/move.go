package node

import (
	"cmp"
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// autoMove marks snapshots by which a sandbox moves to another node.
const autoMove = "move"

// Movable says why a sandbox cannot move to another node while it runs; nil when it can.
func (n *Node) Movable(sb Sandbox) error {
	const op = "node.Movable"
	r, err := n.Runtime(sb.Runtime)
	switch {
	case err != nil:
		return err
	case sb.Spec.Root.Kind == sandbox.RootRepository:
		return sandbox.Errorf(op, sandbox.Unsupported, sb.Name, "it works on a git repository of this host, which other nodes do not have")
	case len(sb.Volumes) > 0:
		return sandbox.Errorf(op, sandbox.Unsupported, sb.Name, "it has the volume %s, which is on this host", sb.Volumes[0].Name).
			WithHint("volumes do not move; make the sandbox without them, or copy what is in them with `atoll cp`")
	case sb.Spec.Network == sandbox.NetworkHost:
		return sandbox.Errorf(op, sandbox.Unsupported, sb.Name, "it uses this host's own network")
	case !r.Capabilities().Memory:
		return sandbox.Errorf(op, sandbox.Unsupported, sb.Name, "runtime %s keeps no memory in snapshots", sb.Runtime).
			WithHint("gvisor and microvm sandboxes move while they run")
	}
	return Portable(snapshot.Manifest{ID: sb.Name, Spec: sb.Spec})
}

// Checkpoint saves the state of a running sandbox, which goes on, for a move. live says that Send is next, which then may have to
// bring what has changed of it.
func (n *Node) Checkpoint(ctx context.Context, ref string, live bool) (Snapshot, error) {
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
	return n.takeState(ctx, rec, Snapshot{Auto: autoMove}, sandbox.SnapshotOptions{Ahead: live})
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
		if rec, err = n.suspend(ctx, e, PauseDisk, to); err != nil {
			return Snapshot{}, err
		}
	}
	return n.GetSnapshot(ctx, rec.Suspended)
}

// Stay lets a sandbox go on that did not leave after all. One that runs is left as it is.
func (n *Node) Stay(ctx context.Context, ref string) (Sandbox, error) {
	const op = "node.Stay"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Sandbox{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.State == sandbox.Running && rec.Moving == "" {
		return rec, nil
	}
	if rec.State == sandbox.Running { // it was being sent, and may stand still
		r, err := n.Runtime(rec.Runtime)
		if err == nil {
			err = r.Resume(ctx, rec.ID)
		}
		if err != nil {
			return Sandbox{}, err
		}
		rec.Moving = ""
		return rec, n.save(ctx, e, rec)
	}
	if err := mustBe(op, rec, sandbox.Paused); err != nil {
		return Sandbox{}, err
	}
	sb, _, err := n.wake(ctx, e)
	if err == nil {
		n.followMain(e)
	}
	return sb, err
}

// Left notes that a sandbox runs on another node now, and removes what is left of it here. Whoever asks for it is sent there
// from then on. One that is gone is no error.
func (n *Node) Left(ctx context.Context, ref, to string) error {
	e, err := n.lock(ctx, "node.Left", ref)
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.State == sandbox.Terminated || rec.Moving == "" {
		return nil
	}
	ended, suspended := time.Now().UTC(), rec.Suspended
	rec.State, rec.Reason, rec.EndedAt = sandbox.Terminated, "moved to node "+to, &ended
	rec.Moved, rec.Moving, rec.Suspended, rec.Spec.Link = to, "", "", nil
	rec.Main = rec.Main.ended(MainLost, 0, "its sandbox has moved to another node")
	if err := n.save(ctx, e, rec); err != nil {
		return err
	}
	n.mu.Lock()
	e.hangUp() // whoever is connected to its ports stays so
	n.mu.Unlock()
	rec.Suspended = suspended
	if err := n.demolish(ctx, rec); err != nil { // reconciling removes what is left
		n.log.Error("removing what is left of a sandbox that moved", "sandbox", rec.ID, "error", err)
	}
	return nil
}

// arriving stands in the record of a sandbox that comes from another node until it runs here.
const arriving = "here"

// Arrive starts a sandbox that comes from another node, as itself, from the snapshot of its state.
func (n *Node) Arrive(ctx context.Context, snap string) (Sandbox, error) {
	s, err := n.GetSnapshot(ctx, snap)
	if err != nil {
		return Sandbox{}, err
	}
	return n.arrive(ctx, s, s.Source, nil)
}

// arrive starts a sandbox with a record, from a snapshot and what comes beside that, if anything does.
func (n *Node) arrive(ctx context.Context, s Snapshot, rec Sandbox, in *Incoming) (Sandbox, error) {
	const op = "node.Arrive"
	before, err := n.Get(ctx, rec.ID)
	if err == nil && live(before.State) {
		return Sandbox{}, sandbox.Errorf(op, sandbox.Exists, rec.ID, "a sandbox with this ID is here")
	}
	rec.State, rec.Reason, rec.Moving, rec.Moved, rec.Suspended, rec.Pooled = sandbox.Creating, "", arriving, "", "", ""
	rec.StartedAt, rec.PausedAt, rec.EndedAt, rec.Spec.Link, rec.Parent = time.Now().UTC(), nil, nil, nil, s.Parent
	rec.Main, rec.Moves = rec.Main.detached(), rec.Moves+1 // on record once it runs
	rec.Ports = freePorts(rec.Ports, before.Ports)
	if in != nil {
		in.before = before
	}
	sb, err := n.launch(ctx, rec, source{snap: s.ID, live: in})
	if err != nil && before.Moved != "" { // it has not come back after all
		err = errors.Join(err, n.remember(ctx, before))
	}
	return sb, err
}

// HasArrived reports whether a sandbox that had moved so many times before has come here since, even if it has gone on, or ended.
func (n *Node) HasArrived(ctx context.Context, id string, moves int) bool {
	sb, err := n.Get(ctx, id)
	return err == nil && sb.ID == id && sb.State != sandbox.Creating && sb.Moves > moves
}

// remember puts the record of a sandbox back that moved away and did not come back after all.
func (n *Node) remember(ctx context.Context, rec Sandbox) error {
	e := newEntry(rec)
	n.mu.Lock()
	n.entries[rec.ID] = e
	n.mu.Unlock()
	n.adoptPorts(e, rec)
	return n.store.put(ctx, kindSandbox, rec.ID, rec)
}

// freePorts replaces ports of the host that are taken here, where others may serve than where the sandbox was, by any others.
// ours are those by which it is reached from here already.
func freePorts(ports, ours []Port) []Port {
	out := slices.Clone(ports)
	for i, p := range out {
		if have := slices.IndexFunc(ours, func(o Port) bool { return o.Guest == p.Guest }); have >= 0 {
			out[i] = ours[have]
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(cmp.Or(p.HostIP, "127.0.0.1"), strconv.Itoa(p.Host)))
		if err != nil {
			out[i].Host = 0
			continue
		}
		_ = l.Close()
	}
	return out
}

const (
	movedKept = 30 * 24 * time.Hour // how long whoever asks for a sandbox is sent to where it has moved
	maxMoved  = 10_000              // of them at once
)

// staleMoves returns the records of sandboxes that moved away too long ago, or too many sandboxes ago.
func (n *Node) staleMoves(now time.Time) []Sandbox {
	all := n.records(func(r Sandbox) bool { return r.Moved != "" })
	slices.SortFunc(all, func(a, b Sandbox) int { return a.EndedAt.Compare(*b.EndedAt) })
	stale := max(0, len(all)-maxMoved)
	for stale < len(all) && now.Sub(*all[stale].EndedAt) >= movedKept {
		stale++
	}
	return all[:stale]
}

// adoptMoved publishes the ports again by which sandboxes that have moved away are reached from here.
func (n *Node) adoptMoved() {
	for _, rec := range n.records(func(r Sandbox) bool { return r.Moved != "" && len(r.Ports) > 0 }) {
		n.mu.RLock()
		e := n.entries[rec.ID]
		n.mu.RUnlock()
		n.adoptPorts(e, rec)
	}
}

// Leaving lists the sandboxes whose move was under way when the node stopped.
func (n *Node) Leaving() []Sandbox {
	return n.records(func(r Sandbox) bool { return r.Moving != "" && r.Moving != arriving && live(r.State) })
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
