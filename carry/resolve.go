package carry

import (
	"context"
	"sync"
	"time"

	"github.com/atoll-run/atoll/migrate"
	"github.com/atoll-run/atoll/sandbox"
)

// departures are the moves from this node that are under way in this process.
type departures struct {
	mu    sync.Mutex
	moves map[string]*mover // by sandbox
}

func (d *departures) add(m *mover) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if other := d.moves[m.sb.ID]; other != nil {
		return sandbox.Errorf("carry.Migrate", sandbox.Conflict, m.sb.Name, "it is moving to node %s already", other.to.Name).
			WithHint("`atoll migrate --abort " + m.sb.Name + "` gives that up")
	}
	if d.moves == nil {
		d.moves = make(map[string]*mover)
	}
	d.moves[m.sb.ID] = m
	return nil
}

func (d *departures) remove(m *mover) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.moves, m.sb.ID)
}

func (d *departures) of(id string) *mover {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.moves[id]
}

// Resolution is how a move was ended.
type Resolution struct {
	Sandbox string `json:"sandbox"`
	Moved   string `json:"moved,omitempty"` // the node where it runs now; empty: it is here
}

// ResolveOptions says how to end a move.
type ResolveOptions struct {
	Abort bool `json:"abort,omitempty"` // give up, as long as the sandbox does not run there
	// Force lets the sandbox go on here without having asked the other node. Should it run there, it runs twice from then on.
	Force bool `json:"force,omitempty"`
}

// resolveTime bounds how long the other node is asked.
const resolveTime = 20 * time.Second

// Resolve ends a move that is under way or in doubt: the other node promises that the sandbox does not run there and never will,
// and it goes on here, or answers that it does. While that node does not answer nothing changes, and the error is Unavailable.
func (c *Carrier) Resolve(ctx context.Context, ref string, o ResolveOptions) (Resolution, error) {
	const op = "carry.Resolve"
	sb, err := c.cfg.Node.Get(ctx, ref)
	if err != nil {
		return Resolution{}, err
	}
	m := c.departures.of(sb.ID)
	if m == nil && sb.Moving == "" {
		if sb.Moved == "" {
			return Resolution{}, sandbox.Errorf(op, sandbox.Conflict, sb.Name, "it is not moving; it is here, and %s", sb.State)
		}
		return Resolution{Sandbox: sb.ID, Moved: sb.Moved}, nil
	}
	switch {
	case m != nil:
		m.forced.Store(o.Force)
		if o.Abort {
			m.cancel()
		}
	default:
		p, err := c.group.Find(sb.Moving)
		if err != nil && !o.Force {
			return Resolution{}, sandbox.Errorf(op, sandbox.Unavailable, sb.Name, "node %s, to which it was moving, is not known any more", sb.Moving).
				WithHint("join that node again: only it knows whether the sandbox runs there")
		}
		m = &mover{c: c, sb: sb, to: p, result: Moved{Sandbox: sb.ID, Node: p.ID}, began: time.Now(), closing: c.life}
		m.forced.Store(o.Force)
		go func() { _, _ = m.drive(c.life, migrate.Recover()) }() // a mover that was faster does the same
	}
	return c.settled(ctx, sb.ID)
}

// settled waits until a sandbox is in one place.
func (c *Carrier) settled(ctx context.Context, id string) (Resolution, error) {
	limit, stop := context.WithTimeout(ctx, resolveTime)
	defer stop()
	for {
		sb, err := c.cfg.Node.Get(limit, id)
		if err != nil {
			return Resolution{}, err
		}
		if sb.Moving == "" && c.departures.of(id) == nil {
			return Resolution{Sandbox: id, Moved: sb.Moved}, nil
		}
		select {
		case <-limit.Done():
			if ctx.Err() != nil {
				return Resolution{}, sandbox.E("carry.Resolve", "", sb.Name, ctx.Err())
			}
			return Resolution{}, sandbox.Errorf("carry.Resolve", sandbox.Unavailable, sb.Name, "the move has not ended: node %s does not answer, and only it knows whether the sandbox runs there", sb.Moving).
				WithHint("it is asked again and again; see `atoll node ls`")
		case <-time.After(20 * time.Millisecond):
		}
	}
}
