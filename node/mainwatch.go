package node

import (
	"context"
	"slices"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// mainGuest is a client that never resumes the sandbox.
func (n *Node) mainGuest(sb Sandbox) *guest.Client {
	return guest.New(n.dialGuest(sb), guest.Options{Token: sb.GuestToken, User: sb.User})
}

// mainWatch is this process's watch of one main command.
type mainWatch struct {
	ctx  context.Context // of all its calls; ends with the node
	stop context.CancelFunc
}

func (n *Node) newWatch() *mainWatch {
	w := &mainWatch{}
	w.ctx, w.stop = context.WithCancel(n.background)
	return w
}

// followMain watches the main command of a sandbox, if there is one and nobody
// does.
func (n *Node) followMain(e *entry) { n.follow(e, n.newWatch(), nil, nil) }

// follow watches a main command, unless that is done already, until it has ended
// or its sandbox stops. p is a view of it, nil for one that has to be found;
// client, which may be nil, gets its output.
func (n *Node) follow(e *entry, w *mainWatch, p *guest.Process, client *attachment) {
	n.mu.Lock()
	sb := e.rec
	idle := e.watch == nil && sb.Main != nil && !sb.Main.over() && sb.State == sandbox.Running && w.ctx.Err() == nil
	if idle {
		e.watch = w
		n.done.Add(1)
	}
	n.mu.Unlock()
	finish := func() {
		w.stop()
		if client != nil {
			close(client.out)
		}
	}
	if !idle {
		finish()
		return
	}
	go func() {
		defer n.done.Done()
		defer finish()
		result, known := n.awaitMain(w.ctx, e, sb, p, client)
		n.mu.Lock()
		if e.watch == w {
			e.watch = nil
		}
		n.mu.Unlock()
		if w.ctx.Err() == nil {
			n.mainEnded(e, result, known)
		}
	}()
}

const (
	// mainLook is how long to wait at first, and at most, before a guest that
	// did not answer is asked for its main command again.
	mainLook, mainLookMost = 20 * time.Millisecond, 2 * time.Second
	// mainGrace is how long after a command's end the guest may take to log it.
	mainGrace = 2 * time.Second
)

// awaitMain returns how the command ended, which is not known when nobody
// saw it. Connections are cut by snapshots and by the end of a node: then it is
// found again. It gives up only when ctx ends.
func (n *Node) awaitMain(ctx context.Context, e *entry, sb Sandbox, p *guest.Process, client *attachment) (guest.Result, bool) {
	g := n.mainGuest(sb)
	defer g.CloseIdle()
	for wait := mainLook; ctx.Err() == nil; wait = min(2*wait, mainLookMost) {
		if p != nil {
			result, err := carry(ctx, p, client)
			_ = p.Close()
			if err == nil {
				return result, true
			}
			p = nil
		}
		if running, err := g.List(ctx); err == nil {
			i := slices.IndexFunc(running, func(r guest.Running) bool {
				return r.Tag == wire.TagMain && (sb.Main.PID == 0 || r.PID == sb.Main.PID)
			})
			if i < 0 {
				logs, stop := context.WithTimeout(ctx, mainGrace)
				defer stop()
				return g.Exit(logs, wire.TagMain, sb.Main.PID)
			}
			if p, err = g.Connect(ctx, running[i].PID); err == nil {
				n.noteMain(e, p.PID)
				wait = mainLook
				continue
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return guest.Result{}, false
}

// noteMain makes known that the command runs and by which PID.
func (n *Node) noteMain(e *entry, pid int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if m := e.rec.Main; m != nil && !m.over() && (m.State != MainRunning || m.PID != pid) {
		running := *m
		running.State, running.PID = MainRunning, pid
		e.rec.Main = &running
	}
}

// carry passes output on until the process ends or the connection does. What
// comes when the client is gone is dropped, so that the command goes on.
func carry(ctx context.Context, p *guest.Process, client *attachment) (guest.Result, error) {
	for {
		ev, err := p.Next()
		if err != nil {
			return guest.Result{}, err
		}
		if ev.Kind == guest.End {
			return *ev.Result, nil
		}
		if client == nil {
			continue
		}
		select {
		case client.out <- ev:
		case <-client.gone:
		case <-ctx.Done():
		}
	}
}

// mainEnded records how the command ended and removes the sandbox if it was to
// go with it, or if the command never started: a node that was killed in Run
// left that.
func (n *Node) mainEnded(e *entry, result guest.Result, known bool) {
	if err := e.op.lock(n.background); err != nil {
		return
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.Main == nil || rec.Main.over() {
		return
	}
	never := !known && rec.Main.State == MainStarting
	switch {
	case !known:
		rec.Main = rec.Main.ended(MainLost, 0, "it is gone, and nobody saw how it ended")
	case result.Signal != 0:
		rec.Main = rec.Main.ended(MainExited, result.ShellCode(), result.Message)
	default:
		rec.Main = rec.Main.ended(MainExited, result.ShellCode(), "")
	}
	n.mu.Lock()
	e.rec.Main = rec.Main // also for those who wait for a sandbox that goes
	n.mu.Unlock()
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventMain, State: rec.State, Reason: rec.Main.String()})
	var err error
	switch {
	case never:
		err = n.end(e, "its main command never started")
	case known && rec.Lifecycle.Remove:
		err = n.end(e, "its main command has ended")
	default:
		err = n.save(context.Background(), e, rec)
	}
	if err != nil {
		n.log.Error("recording the end of a main command", "sandbox", rec.ID, "error", err)
	}
}

// sweepAbandoned removes the sandboxes that were to go with clients of a
// former process.
func (n *Node) sweepAbandoned() {
	for _, r := range n.records(func(r Sandbox) bool { return r.State == sandbox.Running && r.Main.abandoned() }) {
		if err := n.Remove(context.Background(), r.ID); err != nil {
			n.log.Error("removing a sandbox whose client is gone", "sandbox", r.ID, "error", err)
		}
	}
}
