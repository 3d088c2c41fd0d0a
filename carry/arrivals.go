package carry

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	maxArrivals = 64
	arrivalLife = time.Hour
)

// arrivals are the moves to this node.
type arrivals struct {
	mu       sync.Mutex
	prepared map[string]*arrival // by sandbox; at most maxArrivals
}

// arrival is one: whoever holds mu starts the sandbox or gives up.
type arrival struct {
	mu    sync.Mutex
	from  string // the peer's ID
	since time.Time
	live  *decision // about a sandbox that is sent while it runs
}

// serveMove answers a source.
func (c *Carrier) serveMove(w http.ResponseWriter, r *http.Request) {
	var d departure
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&d); err != nil || !sandbox.ValidID(d.Sandbox) {
		peer.Fail(w, sandbox.Errorf("carry.Migrate", sandbox.Invalid, "", "not a move"))
		return
	}
	from := peer.From(r.Context()).ID
	// What is begun is ended, even when the source goes away meanwhile.
	ctx, stop := context.WithTimeout(context.WithoutCancel(r.Context()), stepTimeout)
	defer stop()
	var v verdict
	var err error
	switch r.PathValue("what") {
	case "prepare":
		v.Live, err = c.prepare(ctx, from, d)
	case "switch":
		v, err = c.arrive(ctx, from, d)
	case "give-up":
		v, err = c.giveUp(ctx, from, d)
	default:
		err = sandbox.Errorf("carry.Migrate", sandbox.Invalid, d.Sandbox, "no such step")
	}
	if err != nil {
		peer.Fail(w, err)
		return
	}
	peer.Answer(w, v)
}

// prepare promises to take a sandbox, and says whether it can be sent live.
func (c *Carrier) prepare(ctx context.Context, from string, d departure) (live bool, err error) {
	const op = "carry.Migrate"
	for _, ref := range []string{d.Sandbox, d.Name} {
		if sb, err := c.cfg.Node.Get(ctx, ref); err == nil && ref != "" && sb.State != sandbox.Terminated {
			return false, sandbox.Errorf(op, sandbox.Exists, ref, "the receiving node has a sandbox of this name")
		}
	}
	rt, err := c.cfg.Node.Runtime(d.Runtime)
	if err != nil {
		return false, err
	}
	if !rt.Capabilities().Memory {
		return false, sandbox.Errorf(op, sandbox.Unsupported, d.Name, "runtime %s keeps no memory in snapshots", d.Runtime)
	}
	if p, ok := rt.(interface{ Prepare(context.Context) error }); ok { // else it stands still while that is done
		if err := p.Prepare(ctx); err != nil {
			return false, err
		}
	}
	c.arrivals.mu.Lock()
	defer c.arrivals.mu.Unlock()
	now := time.Now()
	for id, a := range c.arrivals.prepared {
		if now.Sub(a.since) > arrivalLife {
			delete(c.arrivals.prepared, id)
		}
	}
	if len(c.arrivals.prepared) >= maxArrivals {
		return false, sandbox.Errorf(op, sandbox.Exhausted, d.Name, "%d sandboxes are on their way here already", maxArrivals)
	}
	c.arrivals.prepared[d.Sandbox] = &arrival{from: from, since: now, live: new(decision)}
	return rt.Capabilities().Live, nil
}

func (c *Carrier) arrival(from, id string) *arrival {
	c.arrivals.mu.Lock()
	defer c.arrivals.mu.Unlock()
	if a := c.arrivals.prepared[id]; a != nil && a.from == from {
		return a
	}
	return nil
}

// arrive starts the sandbox, unless this node gave up, or was started anew, since it promised to.
func (c *Carrier) arrive(ctx context.Context, from string, d departure) (verdict, error) {
	const op = "carry.Migrate"
	a := c.arrival(from, d.Sandbox)
	if a == nil {
		if c.cfg.Node.HasArrived(ctx, d.Sandbox, d.Moves) {
			return verdict{Runs: true}, nil
		}
		return verdict{}, sandbox.Errorf(op, sandbox.Conflict, d.Sandbox, "the receiving node does not expect this sandbox (any more)")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.arrival(from, d.Sandbox) != a { // given up while we waited
		return verdict{}, sandbox.Errorf(op, sandbox.Conflict, d.Sandbox, "the receiving node does not expect this sandbox any more")
	}
	m, err := c.cfg.Snapshots.Get(d.Snapshot)
	if err == nil && m.Sandbox != d.Sandbox {
		err = sandbox.Errorf(op, sandbox.Invalid, d.Sandbox, "the state is another sandbox's")
	}
	if err == nil {
		_, err = c.cfg.Node.Arrive(ctx, d.Snapshot)
	}
	c.forget(d.Sandbox)
	if err != nil {
		// Nothing of it is left: it has not happened, whatever the kind says.
		return verdict{}, sandbox.Errorf(op, sandbox.Internal, d.Sandbox, "it could not be started there: %w", err)
	}
	c.cfg.Node.DropCopies(d.Sandbox)
	return verdict{Runs: true}, nil
}

func (c *Carrier) forget(id string) {
	c.arrivals.mu.Lock()
	defer c.arrivals.mu.Unlock()
	delete(c.arrivals.prepared, id)
}

// giveUp promises that the sandbox does not run here and will not, or says that it does, or did: what has gone on from here is the
// source's no more.
func (c *Carrier) giveUp(ctx context.Context, from string, d departure) (verdict, error) {
	if a := c.arrival(from, d.Sandbox); a != nil {
		a.live.giveUp()
		a.mu.Lock() // a start that is under way ends first
		defer a.mu.Unlock()
		if c.arrival(from, d.Sandbox) == a {
			c.forget(d.Sandbox)
		}
	}
	if c.cfg.Node.HasArrived(ctx, d.Sandbox, d.Moves) {
		return verdict{Runs: true}, nil
	}
	c.cfg.Node.DropCopies(d.Sandbox)
	return verdict{}, nil
}
