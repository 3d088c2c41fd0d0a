package node

import (
	"context"
	"io"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Sendable says why a running sandbox cannot be sent to another node by its runtime, so that it has to be moved by
// snapshots; empty when it can.
func (n *Node) Sendable(sb Sandbox) string {
	r, err := n.Runtime(sb.Runtime)
	switch {
	case err != nil:
		return err.Error()
	case !r.Capabilities().Live:
		return "runtime " + sb.Runtime + " moves sandboxes by snapshots"
	}
	return ""
}

// Send has a running sandbox sent to another node: to w goes what the sandbox is beyond the snapshot that was taken of it
// last. It goes on meanwhile. When Send returns it stands still, since stopped, and does not run here until Stay, even when
// this process is killed. When Send fails the sandbox goes on.
func (n *Node) Send(ctx context.Context, ref, to, snap string, w io.Writer) (stopped time.Time, err error) {
	const op = "node.Send"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return stopped, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return stopped, err
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return stopped, err
	}
	// Should this process be killed, the next one must ask where the sandbox runs.
	rec.Moving = to
	if err := n.save(ctx, e, rec); err != nil {
		return stopped, err
	}
	stopped, err = r.Send(ctx, rec.ID, n.cfg.Snapshots.Dir(snap), w)
	if err != nil {
		rec.Moving = ""
		clean, stop := context.WithTimeout(context.WithoutCancel(ctx), guestTimeout)
		defer stop()
		if serr := n.save(clean, e, rec); serr != nil {
			n.log.Error("noting that a sandbox stays", "sandbox", rec.ID, "error", serr) // Stay tries again
		}
		return stopped, err
	}
	rec.State, rec.PausedAt = sandbox.Paused, &stopped
	return stopped, n.save(context.WithoutCancel(ctx), e, rec)
}

// Incoming is a sandbox that another node sends while it runs there.
type Incoming struct {
	Record Sandbox       // what that node knows of it
	State  io.ReadCloser // what it sends; closed when it is not waited for any more, or at the end
	// Start is called when all has arrived, and calls run, which lets the sandbox run, once it may not run there any more.
	Start func(run func() error) error

	token  string  // that the guest knows
	before Sandbox // what this node knew of it before
}

// Receive takes in a sandbox that comes from another node, as itself, by a snapshot and what is sent beside that.
func (n *Node) Receive(ctx context.Context, snap string, in Incoming) (Sandbox, error) {
	s, err := n.GetSnapshot(ctx, snap)
	if err != nil {
		return Sandbox{}, err
	}
	rec := in.Record
	if rec.ID != s.Source.ID || rec.Runtime != s.Source.Runtime {
		return Sandbox{}, sandbox.Errorf("node.Receive", sandbox.Invalid, rec.ID, "the snapshot is of another sandbox")
	}
	rec.Spec = s.Source.Spec // which was checked, and whose root is here
	in.token = rec.GuestToken
	return n.arrive(ctx, s, rec, &in)
}

// arrived notes that a sandbox that was sent is about to run here.
func (n *Node) arrived(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.entries[id]; e != nil {
		e.before = Sandbox{}
	}
}

// whereabouts is a sandbox's record, or, while it arrives from another node that it left for before, the one that says so.
func (n *Node) whereabouts(e *entry) Sandbox {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if e.rec.Moving == arriving && e.before.Moved != "" {
		return e.before
	}
	return e.rec
}
