package carry

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// A sandbox that is sent while it runs goes in one request, which the source makes at Stream and ends with Switch. Its body:
// a length (uvarint) and a passage in JSON; what the runtime sends, in runs, each after its length (uvarint), the last one
// empty; and, once the sandbox stands still and that is on record at the source, one byte: run it. A body that ends without
// that byte is void. The answer is two verdicts: the first when the sandbox runs, the second when it is on record there.

// livePath is where it is asked for.
const livePath = "/carry/v1/live"

// runIt is the byte that says: it runs here no more.
const runIt = 'R'

// passage describes a sandbox that is sent.
type passage struct {
	Snapshot string       `json:"snapshot"` // which both nodes have, and which all that is sent is beside
	Record   node.Sandbox `json:"record"`
}

// maxPassage bounds its description, in bytes.
const maxPassage = 1 << 20

// departing is the source's end of a sandbox that is being sent.
type departing struct {
	body   *io.PipeWriter
	end    context.CancelFunc // ends the request
	hold   func() bool        // keeps the request when the caller gives up; false: it has ended already
	answer chan error         // of the request, nil when it has begun; buffered
	resp   *http.Response     // set before answer is
	pace   func(n int) error
	wire   atomic.Int64
}

// depart begins to send a sandbox. Whatever comes of it, end is called at last.
func (c *Carrier) depart(ctx context.Context, to peer.Peer, p passage) (*departing, error) {
	head, err := json.Marshal(p)
	if err != nil {
		return nil, sandbox.E("carry.Migrate", sandbox.Internal, p.Record.ID, err)
	}
	l, err := c.group.Link(ctx, to)
	if err != nil {
		return nil, err
	}
	// The caller's giving up ends it until the switch.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	from, body := io.Pipe()
	d := &departing{body: body, end: end, hold: context.AfterFunc(ctx, end), answer: make(chan error, 1),
		pace: func(n int) error { return c.cfg.Pacer.Wait(life, pace.Migration, n) }}
	go func() {
		resp, err := l.Do(life, http.MethodPost, livePath, from) //nolint:bodyclose // finish closes it, and the end of life does
		if err != nil {
			_ = from.CloseWithError(err)
		}
		d.resp = resp
		d.answer <- err
	}()
	_, err = body.Write(append(binary.AppendUvarint(nil, uint64(len(head))), head...))
	if err != nil {
		d.close()
		return nil, d.why(err)
	}
	return d, nil
}

// Write sends a run.
func (d *departing) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := d.pace(len(p)); err != nil {
		return 0, err
	}
	n, err := d.body.Write(append(binary.AppendUvarint(make([]byte, 0, len(p)+binary.MaxVarintLen64), uint64(len(p))), p...))
	d.wire.Add(int64(n))
	return min(n, len(p)), err
}

// why is the reason of a failure: what the target said, if it said something.
func (d *departing) why(err error) error {
	select {
	case said := <-d.answer:
		d.answer <- said
		if said != nil {
			return said
		}
	default:
	}
	return err
}

// finish has the target start the sandbox, which stands still here. ran is called when the target says that it runs.
func (d *departing) finish(ran func()) error {
	const op = "carry.Migrate"
	if !d.hold() {
		return sandbox.E(op, sandbox.Conflict, "", errors.New("the caller gave up before the other node was told to start it"))
	}
	defer d.close()
	limit := time.AfterFunc(stepTimeout, d.end)
	defer limit.Stop()
	if _, err := d.body.Write([]byte{0, runIt}); err != nil {
		return d.why(sandbox.E(op, sandbox.Unavailable, "", err))
	}
	_ = d.body.Close()
	if err := <-d.answer; err != nil {
		return err
	}
	defer d.resp.Body.Close()
	answers := json.NewDecoder(io.LimitReader(d.resp.Body, maxOffer))
	for _, then := range []func(){ran, func() {}} {
		var v verdict
		if err := answers.Decode(&v); err != nil {
			return sandbox.E(op, sandbox.Unavailable, "", err)
		}
		if !v.Runs {
			return sandbox.Errorf(op, sandbox.Internal, "", "it could not be started there: %s", v.Problem)
		}
		then()
	}
	return nil
}

// close ends the request. A target that was not told to start the sandbox drops it.
func (d *departing) close() {
	d.hold()
	d.end()
	_ = d.body.CloseWithError(context.Canceled)
}

// decision is what a target does with a sandbox that is being sent: one of two, once.
type decision struct {
	mu     sync.Mutex
	made   bool
	starts bool
	drop   context.CancelFunc // ends the taking in; nil before it begins
}

// take says how to end the taking in, which begins. It fails when that was given up.
func (d *decision) take(drop context.CancelFunc) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop = drop
	return !d.made
}

// start decides to start it, unless it was decided otherwise.
func (d *decision) start() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.made {
		d.made, d.starts = true, true
	}
	return d.starts
}

// begun reports whether it was decided to start it.
func (d *decision) begun() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts
}

// giveUp decides not to, unless it was decided otherwise.
func (d *decision) giveUp() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.made && d.drop != nil {
		d.drop()
	}
	d.made = true
}

// serveLive takes in a sandbox.
func (c *Carrier) serveLive(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Migrate"
	body := bufio.NewReaderSize(r.Body, 64<<10)
	var p passage
	head, err := readSized(body, maxPassage)
	if err == nil {
		err = json.Unmarshal(head, &p)
	}
	if err != nil || !sandbox.ValidID(p.Record.ID) {
		peer.Fail(w, sandbox.Errorf(op, sandbox.Invalid, p.Record.ID, "not a sandbox: %w", err))
		return
	}
	answered, err := c.takeIn(w, r, body, p)
	switch {
	case err == nil:
		_ = json.NewEncoder(w).Encode(verdict{Runs: true}) // a source that does not hear it asks
	case answered:
		_ = json.NewEncoder(w).Encode(verdict{Problem: err.Error()})
	default:
		peer.Fail(w, err)
	}
}

// takeIn takes a sandbox in and starts it. answered says that w has the first verdict.
func (c *Carrier) takeIn(w http.ResponseWriter, r *http.Request, body *bufio.Reader, p passage) (answered bool, err error) {
	const op = "carry.Migrate"
	id, from := p.Record.ID, peer.From(r.Context()).ID
	a := c.arrival(from, id)
	if a == nil {
		return false, sandbox.Errorf(op, sandbox.Conflict, id, "the receiving node does not expect this sandbox (any more)")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// What is begun is ended, even when the source goes away meanwhile; until it is told to start, it ends with the request.
	ctx, drop := context.WithCancel(context.WithoutCancel(r.Context()))
	defer drop()
	defer context.AfterFunc(r.Context(), a.live.giveUp)()
	if c.arrival(from, id) != a || !a.live.take(drop) {
		return false, sandbox.Errorf(op, sandbox.Conflict, id, "the receiving node does not expect this sandbox any more")
	}
	state := &arrivingState{runReader{in: body}, r.Body}
	defer context.AfterFunc(ctx, func() { _ = state.Close() })() // nobody waits for the rest of it
	_, err = c.cfg.Node.Receive(ctx, p.Snapshot, node.Incoming{Record: p.Record, State: state, Start: func(run func() error) error {
		if err := told(state, body); err != nil {
			return err
		}
		if !a.live.start() {
			return errors.New("it was given up")
		}
		if err := run(); err != nil {
			return err
		}
		answered = true
		_ = json.NewEncoder(w).Encode(verdict{Runs: true})
		_ = http.NewResponseController(w).Flush() // the same
		return nil
	}})
	if a.live.begun() {
		c.forget(id)
	}
	if err != nil {
		return answered, fail(op, id, sandbox.Internal, err)
	}
	c.cfg.Node.DropCopies(id)
	return answered, nil
}

// told waits for the word that lets the sandbox run.
func told(state io.Reader, body *bufio.Reader) error {
	if _, err := io.Copy(io.Discard, state); err != nil {
		return err
	}
	word, err := body.ReadByte()
	if err == nil && word != runIt {
		err = fmt.Errorf("the word %q is not known", word)
	}
	if err != nil {
		return fmt.Errorf("the node that sent it did not let it go: %w", err)
	}
	return nil
}

// arrivingState reads what a source's runtime sends.
type arrivingState struct {
	runReader
	body io.Closer
}

// Close ends the waiting for more.
func (s *arrivingState) Close() error { return s.body.Close() }
