package carry

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/migrate"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// Moved is what a live move took.
type Moved struct {
	Sandbox  string        `json:"sandbox"`
	Node     string        `json:"node"` // where it runs now
	Way      Way           `json:"way"`
	Why      string        `json:"why,omitempty"` // it was not moved live
	Rounds   []int64       `json:"rounds"`        // bytes sent by each copy while it ran
	Stream   int64         `json:"stream"`        // bytes of its runtime's stream, of which the last were sent while it stood still; 0 unless live
	Final    int64         `json:"final"`         // bytes of the last copy, sent while it stood still; 0 when live
	Wire     int64         `json:"wire"`          // all of these bytes
	Downtime time.Duration `json:"downtime"`      // from its stop until the target said that it runs
	Took     time.Duration `json:"took"`
}

// Way is how a sandbox was moved.
type Way string

// The ways.
const (
	Live        Way = "live"      // sent while it runs, by its runtime, beside a first copy
	BySnapshots Way = "snapshots" // copied again and again, and once more while it stands still
)

const (
	stepTimeout = 2 * time.Minute // of a step that only asks
	stepPause   = 2 * time.Second // before one is repeated
)

// departure is what a source says of a sandbox.
type departure struct {
	Sandbox  string `json:"sandbox"`
	Name     string `json:"name,omitempty"`
	Runtime  string `json:"runtime,omitempty"`
	Snapshot string `json:"snapshot,omitempty"` // of Switch: its final state
	Moves    int    `json:"moves,omitempty"`    // how often it had moved before
}

// verdict is what a target answers.
type verdict struct {
	Runs bool `json:"runs"` // or has arrived, and has gone on or ended since
	// Live says that a sandbox can be sent while it runs.
	Live    bool   `json:"live,omitempty"`
	Problem string `json:"problem,omitempty"` // why it does not run
}

// Migrate moves a running sandbox to a peer and returns when it runs there, under the same ID and name. When it fails, the
// sandbox runs here as before; should the peer be out of reach in the one moment that matters, it stands still until the peer
// answers. report may be nil.
func (c *Carrier) Migrate(ctx context.Context, ref, to string, report func(Progress)) (Moved, error) {
	const op = "carry.Migrate"
	p, err := c.group.Find(to)
	if err != nil {
		return Moved{}, err
	}
	sb, err := c.cfg.Node.Get(ctx, ref)
	if err != nil {
		return Moved{}, err
	}
	if sb.State != sandbox.Running {
		return Moved{}, sandbox.Errorf(op, sandbox.Conflict, sb.Name, "it is %s, and only what runs is moved", sb.State).
			WithHint("`atoll resume` it first; of what has ended, a snapshot that was made before can go with `atoll snapshot push`")
	}
	if err := c.cfg.Node.Movable(sb); err != nil {
		return Moved{}, err
	}
	m := &mover{c: c, sb: sb, to: p, report: report, result: Moved{Sandbox: sb.ID, Node: p.ID}, began: time.Now()}
	end, err := m.drive(ctx, migrate.Begin())
	if err != nil {
		return Moved{}, err
	}
	m.result.Took = time.Since(m.began)
	m.result.Wire = m.result.Stream + m.result.Final
	for _, n := range m.result.Rounds {
		m.result.Wire += n
	}
	if end.Step == migrate.Moved {
		return m.result, nil
	}
	if m.err == nil {
		m.err = ctx.Err()
	}
	return Moved{}, fail(op, sb.Name, sandbox.Internal, m.err)
}

// Recover ends the moves that were under way when this node was stopped. It returns when all have ended or ctx ends.
func (c *Carrier) Recover(ctx context.Context) {
	var wg sync.WaitGroup
	for _, sb := range c.cfg.Node.Leaving() {
		p, err := c.group.Find(sb.Moving)
		if err != nil {
			c.cfg.Log.Error("a sandbox was leaving for a node that is not known any more; join that node again", "sandbox", sb.ID, "node", sb.Moving)
			continue
		}
		wg.Go(func() {
			m := &mover{c: c, sb: sb, to: p, result: Moved{Sandbox: sb.ID, Node: p.ID}, began: time.Now(), closing: ctx}
			end, err := m.drive(ctx, migrate.Recover())
			if err != nil {
				return // somebody resolves it already
			}
			c.cfg.Log.Info("a move that was interrupted has ended", "sandbox", sb.ID, "node", p.ID, "end", end.Step)
		})
	}
	wg.Wait()
}

// mover drives one move.
type mover struct {
	c       *Carrier
	sb      node.Sandbox
	to      peer.Peer
	report  func(Progress)
	began   time.Time
	closing context.Context // ends when this process does; nil: the caller's giving up does not end what must be ended

	ended  chan struct{}      // closed when it has ended, or goes on after the next start
	cancel context.CancelFunc // gives up
	forced atomic.Bool        // it is believed that the target does not have the sandbox, without asking

	final  string     // the snapshot of the last copy
	stream *departing // what is sent live; nil: nothing is
	live   bool       // both ends can
	frozen time.Time
	result Moved
	err    error // the first
}

// drive is run, unless the sandbox is moving already.
func (m *mover) drive(ctx context.Context, s migrate.State) (migrate.State, error) {
	ctx, m.cancel = context.WithCancel(ctx)
	defer m.cancel()
	m.ended = make(chan struct{})
	if err := m.c.departures.add(m); err != nil {
		return s, err
	}
	defer m.c.departures.remove(m)
	defer func() {
		if m.stream != nil {
			m.stream.close()
		}
	}()
	defer close(m.ended)
	return m.run(ctx, s), nil
}

// run carries out steps until the move is over, or this process ends in the middle: then Recover goes on.
func (m *mover) run(ctx context.Context, s migrate.State) migrate.State {
	for !s.Over() {
		work := ctx
		if s.Away() {
			work = context.WithoutCancel(ctx)
			if m.closing != nil {
				work = m.closing
			}
		}
		outcome, wire, err := m.step(work, s.Step)
		if err != nil {
			m.c.cfg.Log.Warn("a step of a move failed", "sandbox", m.sb.ID, "step", s.Step, "error", err)
			if m.err == nil {
				m.err = err
			}
		}
		next := s.Next(outcome, wire, ctx.Err() != nil)
		if s.Step == migrate.Prepare {
			next.Live = m.live
		}
		m.result.Rounds = next.Rounds
		if next.Step == s.Step && s.Step != migrate.Copy {
			select {
			case <-work.Done(): // this process ends
				return s
			case <-m.c.closed:
				return s
			case <-time.After(stepPause):
			}
		}
		s = next
	}
	return s
}

// step carries out one step.
func (m *mover) step(ctx context.Context, s migrate.Step) (migrate.Outcome, int64, error) {
	n := m.c.cfg.Node
	if s == migrate.Ask && m.forced.Load() {
		return migrate.Done, 0, nil // it is taken for granted
	}
	if m.c.fault != nil {
		if o, err := m.c.fault(s); err != nil {
			return o, 0, err
		}
	}
	switch s {
	case migrate.Prepare:
		err := m.prepare(ctx)
		return settled(err), 0, err
	case migrate.Copy:
		snap, err := n.Checkpoint(ctx, m.sb.ID, m.live)
		if err != nil {
			return migrate.Failed, 0, err
		}
		m.final = snap.ID
		wire, err := m.send(ctx, snap.ID)
		return settled(err), wire, err
	case migrate.Stream:
		return m.sendLive(ctx)
	case migrate.Freeze:
		m.frozen = time.Now()
		snap, err := n.Depart(ctx, m.sb.ID, m.to.ID)
		m.final = snap.ID
		return settled(err), 0, err
	case migrate.Send:
		wire, err := m.send(ctx, m.final)
		m.result.Final = wire
		return settled(err), wire, err
	case migrate.Switch:
		if m.stream != nil {
			err := m.stream.finish(func() { m.result.Downtime = time.Since(m.frozen) })
			m.result.Way = Live
			return settled(err), 0, err
		}
		_, err := m.ask(ctx, "switch", departure{Sandbox: m.sb.ID, Moves: m.sb.Moves, Snapshot: m.final})
		m.result.Downtime = time.Since(m.frozen)
		return settled(err), 0, err
	case migrate.Ask:
		v, err := m.ask(ctx, "give-up", departure{Sandbox: m.sb.ID, Moves: m.sb.Moves})
		if err == nil && v.Runs {
			return migrate.Runs, 0, nil
		}
		return settled(err), 0, err
	case migrate.Thaw:
		if m.stream != nil {
			m.stream.close()
		}
		_, err := n.Stay(ctx, m.sb.ID)
		if sandbox.Is(err, sandbox.NotFound) {
			err = nil // it was removed meanwhile
		}
		return settled(err), 0, err
	case migrate.Clean:
		err := n.Left(ctx, m.sb.ID, m.to.ID)
		if err == nil {
			n.DropCopies(m.sb.ID)
		}
		return settled(err), 0, err
	case migrate.Drop:
		n.DropCopies(m.sb.ID)
		_, err := m.ask(ctx, "give-up", departure{Sandbox: m.sb.ID, Moves: m.sb.Moves})
		return settled(err), 0, err
	}
	return migrate.Done, 0, nil
}

// prepare has the other node get ready, and decides which way the sandbox goes.
func (m *mover) prepare(ctx context.Context) error {
	v, err := m.ask(ctx, "prepare", departure{Sandbox: m.sb.ID, Name: m.sb.Name, Runtime: m.sb.Runtime})
	m.result.Way, m.result.Why = BySnapshots, m.c.cfg.Node.Sendable(m.sb)
	if m.result.Why == "" && !v.Live {
		m.result.Why = "the other node takes none in live"
	}
	m.live = m.result.Why == ""
	return err
}

// sendLive sends the sandbox while it runs. When it is Done the sandbox stands still, and its end is sent by Switch.
func (m *mover) sendLive(ctx context.Context) (migrate.Outcome, int64, error) {
	n := m.c.cfg.Node
	rec, err := n.Get(ctx, m.sb.ID)
	if err == nil {
		m.stream, err = m.c.depart(ctx, m.to, passage{Snapshot: m.final, Record: rec})
	}
	if err == nil {
		m.frozen, err = n.Send(ctx, m.sb.ID, m.to.ID, m.final, m.stream)
		m.result.Stream = m.stream.wire.Load()
		if err != nil {
			err = m.stream.why(err)
			m.stream.close()
		}
	}
	switch {
	case err == nil:
		return migrate.Done, 0, nil
	case sandbox.Is(err, sandbox.Unsupported):
		m.stream, m.live, m.result.Why = nil, false, err.Error()
		return migrate.Refused, 0, err
	}
	return migrate.Failed, 0, err // the target was not told to start it
}

// settled is what an error says about whether something happened. An error that came from the other end, or from here, is
// an answer; only a broken connection leaves it open.
func settled(err error) migrate.Outcome {
	switch {
	case err == nil:
		return migrate.Done
	case sandbox.Is(err, sandbox.Unavailable), sandbox.Is(err, sandbox.Timeout), sandbox.Is(err, sandbox.Canceled):
		return migrate.Unknown
	}
	return migrate.Failed
}

func (m *mover) send(ctx context.Context, snap string) (int64, error) {
	it, err := m.c.snapshotItem(snap)
	if err != nil {
		return 0, err
	}
	res, err := m.c.push(ctx, it, func(ctx context.Context) (*peer.Link, error) { return m.c.group.Link(ctx, m.to) }, m.report)
	return res.Wire, err
}

func (m *mover) ask(ctx context.Context, what string, d departure) (v verdict, err error) {
	ctx, stop := context.WithTimeout(ctx, stepTimeout)
	defer stop()
	l, err := m.c.group.Link(ctx, m.to)
	if err != nil {
		return v, err
	}
	return v, l.Call(ctx, http.MethodPost, "/carry/v1/moves/"+what, d, &v)
}
