package node

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/lasting"
	"github.com/atoll-run/atoll/sandbox"
)

// Forward opens a connection to a port of a sandbox that another node may have, see Node.Reach.
type Forward func(ctx context.Context, node, id string, port int, wake bool) (net.Conn, error)

// UseForward sets the way to sandboxes that have moved to other nodes.
func (n *Node) UseForward(f Forward) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forward = f
}

// Dial opens a connection to a TCP port inside a sandbox, also one that has moved to another node. A sandbox that is paused
// and resumes on traffic is resumed first. Where the runtime keeps the memory of sandboxes that move, the connection outlives
// their moves, the guest's side of it included.
func (n *Node) Dial(ctx context.Context, ref string, port int) (net.Conn, error) {
	rec, err := n.Settled(ctx, ref)
	if err != nil {
		return nil, err
	}
	if !n.lasts(rec) {
		return n.Reach(ctx, rec.ID, port, true)
	}
	var begun atomic.Bool
	c, err := lasting.Dial(ctx, func(ctx context.Context) (net.Conn, error) {
		// Whoever pauses a sandbox cuts its connections: only new ones wake it.
		return n.Reach(ctx, rec.ID, sandbox.GuestPort, !begun.Swap(true))
	}, port, rec.GuestToken)
	if lasting.Foreign(err) { // an agent from before there were such connections
		n.setForeign(rec.ID)
		return n.Reach(ctx, rec.ID, port, true)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// lasts reports whether connections to a sandbox are such that outlive its moves.
func (n *Node) lasts(rec Sandbox) bool {
	r, ok := n.runtimes[rec.Runtime]
	n.mu.RLock()
	defer n.mu.RUnlock()
	e := n.entries[rec.ID]
	return ok && rec.Spec.HasAgent() && r.Capabilities().Memory && (e == nil || !e.foreign)
}

func (n *Node) setForeign(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.entries[id]; e != nil {
		e.foreign = true
	}
}

// Reach opens a connection to a port of a sandbox that breaks when the sandbox moves. wake resumes a paused one that resumes on
// traffic. The error is Unavailable while the sandbox moves.
func (n *Node) Reach(ctx context.Context, id string, port int, wake bool) (net.Conn, error) {
	const op = "node.Dial"
	e, err := n.find(op, id)
	if err != nil {
		return nil, err
	}
	if rec := n.whereabouts(e); rec.Moved != "" {
		n.mu.RLock()
		forward := n.forward
		n.mu.RUnlock()
		if forward == nil {
			return nil, sandbox.Errorf(op, sandbox.Unavailable, rec.Name, "it has moved to node %s", rec.Moved)
		}
		return forward(ctx, rec.Moved, rec.ID, port, wake)
	} else if rec.Moving != "" && rec.State != sandbox.Running {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, rec.Name, "it is moving to node %s", rec.Moving)
	}
	rec, dozing, leave := n.enter(e)
	if dozing || rec.State == sandbox.Paused && rec.Lifecycle.AutoResume && wake {
		rec, err = n.Resume(ctx, rec.ID)
	}
	if err == nil {
		err = mustBe(op, rec, sandbox.Running)
	}
	var c net.Conn
	if err == nil {
		c, err = n.dialSaved(ctx, e, rec, port)
		if sandbox.Is(err, sandbox.Conflict) && !wake { // its end is not on record yet
			err = sandbox.E(op, sandbox.Unavailable, rec.Name, err)
		}
	}
	if err != nil {
		leave()
		return nil, err
	}
	if rec.Lifecycle.Idle == 0 {
		return c, nil
	}
	return &visit{c, leave}, nil
}

// savedFor bounds how long a dial waits for a sandbox that is on record as running and stands still: it is being saved, or was
// when a daemon was killed, and goes on as soon as the next one has looked at it.
const savedFor = 10 * time.Second

// dialSaved dials a sandbox that is on record as running.
func (n *Node) dialSaved(ctx context.Context, e *entry, rec Sandbox, port int) (net.Conn, error) {
	for began := time.Now(); ; {
		c, err := n.dialer(rec)(ctx, port)
		if !sandbox.Is(err, sandbox.Conflict) || time.Since(began) > savedFor || n.record(e).State != sandbox.Running {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(settlePause):
		}
	}
}

// settlePause is how often it is looked whether a move has ended.
const settlePause = 5 * time.Millisecond

// Settled returns a sandbox as Get does, but waits while it is between two nodes.
func (n *Node) Settled(ctx context.Context, ref string) (Sandbox, error) {
	for {
		e, err := n.find("node.Get", ref)
		if err != nil {
			return Sandbox{}, err
		}
		rec := n.whereabouts(e)
		if rec.Moving == "" || rec.State == sandbox.Running {
			return rec, nil
		}
		select {
		case <-ctx.Done():
			return rec, sandbox.E("node.Dial", "", ref, ctx.Err())
		case <-time.After(settlePause):
		}
	}
}

// dialer connects to a sandbox's machine whatever its record says of its state.
func (n *Node) dialer(rec Sandbox) func(ctx context.Context, port int) (net.Conn, error) {
	return func(ctx context.Context, port int) (net.Conn, error) {
		r, err := n.Runtime(rec.Runtime)
		if err != nil {
			return nil, err
		}
		return r.Dial(ctx, rec.ID, port)
	}
}

// dialGuest connects to a sandbox's guest whatever its record says.
func (n *Node) dialGuest(rec Sandbox) guest.Dial {
	dial := n.dialer(rec)
	return func(ctx context.Context) (net.Conn, error) { return dial(ctx, sandbox.GuestPort) }
}

// Changes writes what a sandbox changed in its root, as an OCI layer.
func (n *Node) Changes(ctx context.Context, ref string, w io.Writer) error {
	const op = "node.Changes"
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return err
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return err
	}
	return r.Changes(ctx, rec.ID, w)
}

// listener carries connections from a port of the host to one of a sandbox.
type listener struct {
	net.Listener
	mu    sync.Mutex
	conns map[net.Conn]struct{} // both ends of each carried connection; nil after close
}

// portConns bounds the connections that one published port carries at once.
const portConns = 1024

// Expose publishes a port of a sandbox on the host.
func (n *Node) Expose(ctx context.Context, ref string, p Port) (Port, error) {
	err := n.change(ctx, "node.Expose", ref, func(rec *Sandbox) error {
		e, err := n.find("node.Expose", rec.ID)
		if err != nil {
			return err
		}
		if rec.State == sandbox.Running {
			if p, err = n.openPort(e, rec.ID, p); err != nil {
				return err
			}
		}
		rec.Ports = append(rec.Ports, p)
		return nil
	})
	return p, err
}

// Unexpose takes a published port back and cuts its connections.
func (n *Node) Unexpose(ctx context.Context, ref string, guestPort int) error {
	const op = "node.Unexpose"
	return n.change(ctx, op, ref, func(rec *Sandbox) error {
		kept := make([]Port, 0, len(rec.Ports))
		for _, p := range rec.Ports {
			if p.Guest != guestPort {
				kept = append(kept, p)
			}
		}
		if len(kept) == len(rec.Ports) {
			return sandbox.Errorf(op, sandbox.NotFound, rec.Name, "port %d is not published", guestPort)
		}
		rec.Ports = kept
		n.mu.Lock()
		defer n.mu.Unlock()
		if e := n.entries[rec.ID]; e != nil && e.listeners[guestPort] != nil {
			e.listeners[guestPort].close()
			delete(e.listeners, guestPort)
		}
		return nil
	})
}

// openPorts publishes all of the record's ports and notes which host ports were
// chosen. On an error those already open are closed with the entry.
func (n *Node) openPorts(e *entry, rec *Sandbox) error {
	ports := append([]Port(nil), rec.Ports...)
	for i, p := range ports {
		n.mu.RLock()
		_, open := e.listeners[p.Guest]
		n.mu.RUnlock()
		if open { // it waited for traffic, or comes back from another node
			continue
		}
		var err error
		if ports[i], err = n.openPort(e, rec.ID, p); err != nil {
			return err
		}
	}
	rec.Ports = ports
	return nil
}

func (n *Node) openPort(e *entry, id string, p Port) (Port, error) {
	const op = "node.Expose"
	if p.HostIP == "" {
		p.HostIP = "127.0.0.1"
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(p.HostIP, strconv.Itoa(p.Host)))
	if err != nil {
		return p, sandbox.E(op, sandbox.Conflict, id, err).WithHint("choose another host port, or 0 for any")
	}
	p.Host = ln.Addr().(*net.TCPAddr).Port
	l := &listener{Listener: ln, conns: make(map[net.Conn]struct{})}
	n.mu.Lock()
	if _, there := e.listeners[p.Guest]; there {
		n.mu.Unlock()
		l.close()
		return p, sandbox.Errorf(op, sandbox.Exists, id, "port %d is published already", p.Guest)
	}
	e.listeners[p.Guest] = l
	n.mu.Unlock()
	go l.serve(func(ctx context.Context) (net.Conn, error) { return n.Dial(ctx, id, p.Guest) })
	return p, nil
}

// serve accepts until the listener is closed.
func (l *listener) serve(dial func(context.Context) (net.Conn, error)) {
	slots := make(chan struct{}, portConns)
	for {
		slots <- struct{}{}
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			ctx, stop := context.WithTimeout(context.Background(), guestTimeout)
			inside, err := dial(ctx)
			stop()
			if err != nil {
				return // the client sees its connection closed, as from a port that nobody serves
			}
			defer inside.Close()
			if !l.hold(c, inside) {
				return
			}
			defer l.release(c, inside)
			Splice(c, inside)
		}()
	}
}

// hold notes open connections so that close can cut them; false once closed.
func (l *listener) hold(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		return false
	}
	for _, c := range conns {
		l.conns[c] = struct{}{}
	}
	return true
}

func (l *listener) release(conns ...net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		delete(l.conns, c)
	}
}

func (l *listener) close() {
	_ = l.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cutAll()
	l.conns = nil
}

// cut ends the connections and goes on listening.
func (l *listener) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cutAll()
}

// cutAll ends the connections, which their carriers then release. l.mu is held.
func (l *listener) cutAll() {
	for c := range l.conns {
		_ = c.Close()
	}
}

// Splice copies between two connections until both directions have ended, and
// closes both. The end of one direction is passed on by itself where the
// connection can; a failure ends both.
func Splice(a, b net.Conn) {
	var wg sync.WaitGroup
	one := func(dst, src net.Conn) {
		_, err := io.Copy(dst, src)
		if w, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
			err = w.CloseWrite()
		} else if err == nil {
			err = errors.ErrUnsupported
		}
		if err != nil { // the pair is of no use any more
			_ = a.Close()
			_ = b.Close()
		}
	}
	wg.Go(func() { one(a, b) })
	wg.Go(func() { one(b, a) })
	wg.Wait()
	_ = a.Close()
	_ = b.Close()
}
