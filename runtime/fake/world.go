package fake

import (
	"context"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/atoll-run/atoll/runtime/feed"
	"github.com/atoll-run/atoll/sandbox"
)

// World is the machine on which the sandboxes of fake runtimes live. It is
// gone with this process.
type World struct {
	dir    string // sandboxes' directories are in here
	guest  string // path of the agent
	feed   feed.Feed
	faults faults

	mu    sync.Mutex
	boxes map[string]*box
}

// NewWorld makes a world without sandboxes. dir is an existing directory; guest
// is the path of the agent's binary. Close it.
func NewWorld(dir, guest string) *World {
	w := &World{dir: dir, guest: guest, boxes: map[string]*box{}}
	w.faults.kill = func(id string) { w.Kill(id, "an injected fault") }
	return w
}

// Close ends every sandbox.
func (w *World) Close() {
	w.mu.Lock()
	all := slices.Collect(maps.Values(w.boxes))
	w.mu.Unlock()
	for _, b := range all {
		b.busy <- struct{}{}
		w.remove(b)
		b.unlock()
	}
	w.feed.Close()
}

// Kill ends a sandbox as a crash would: it goes into the Error state and an
// event tells so. An unknown ID or one that is dead already is left alone.
func (w *World) Kill(id, reason string) {
	w.mu.Lock()
	b := w.boxes[id]
	w.mu.Unlock()
	if b != nil {
		b.die(reason)
	}
}

// Serve makes Dial to the port of a sandbox reach the handler, which must close
// its end. It stands in for a server inside; a nil handler takes it away.
func (w *World) Serve(id string, port int, handler func(net.Conn)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b := w.boxes[id]; b != nil {
		b.ports[port] = handler
	}
}

// add makes a sandbox that does not run yet, locked for the caller.
func (w *World) add(op string, spec sandbox.Spec) (*box, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, taken := w.boxes[spec.ID]; taken {
		return nil, sandbox.E(op, sandbox.Exists, spec.ID, nil)
	}
	b := &box{
		world: w, spec: spec.Clone(), dir: filepath.Join(w.dir, spec.ID),
		busy: make(chan struct{}, 1), current: sandbox.Creating, ports: map[int]func(net.Conn){},
	}
	b.busy <- struct{}{}
	w.boxes[spec.ID] = b
	return b, nil
}

// lock waits until nobody else works on the sandbox.
func (w *World) lock(ctx context.Context, op, id string) (*box, error) {
	w.mu.Lock()
	b := w.boxes[id]
	w.mu.Unlock()
	if b == nil {
		return nil, sandbox.E(op, sandbox.NotFound, id, nil)
	}
	select {
	case b.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, sandbox.E(op, "", id, ctx.Err())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.boxes[id] != b { // removed while we waited
		b.unlock()
		return nil, sandbox.E(op, sandbox.NotFound, id, nil)
	}
	return b, nil
}

// remove ends a locked sandbox and forgets it.
func (w *World) remove(b *box) {
	b.end()
	_ = os.RemoveAll(b.dir)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.boxes, b.spec.ID)
}

func (w *World) known(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.boxes[id] != nil
}

func (w *World) list() []sandbox.Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make([]sandbox.Status, 0, len(w.boxes))
	for _, b := range w.boxes {
		all = append(all, sandbox.Status{ID: b.spec.ID, State: b.current, Reason: b.reason, Spec: b.spec.Clone()})
	}
	slices.SortFunc(all, func(a, b sandbox.Status) int { return strings.Compare(a.ID, b.ID) })
	return all
}
