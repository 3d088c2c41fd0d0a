package fake

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Fault is something that goes wrong with calls of the runtime. Faults meet
// calls in the order in which they were added; all that match take effect.
type Fault struct {
	Op      string // the method it lies in wait for: "Create"; empty: every one
	Sandbox string // the ID that the call must be about; empty: any
	Skip    int    // so many matching calls pass unharmed first
	Times   int    // then so many are hit; 0: all from then on

	Delay time.Duration // the call waits so long, or until its context ends
	Die   bool          // the sandbox dies
	Kind  sandbox.Kind  // the call fails; empty: it goes on
	Cut   int64         // Dial: the connection ends once so many bytes were read; 0: never
}

// faults decides what goes wrong. The zero value lets all pass.
type faults struct {
	mu     sync.Mutex
	script []*pending
	chaos  chaos
	calls  map[string]uint64 // calls so far by operation and sandbox, for chaos
	kill   func(id string)
}

// pending is a fault and the number of calls that matched it.
type pending struct {
	Fault
	seen int
}

// chaos makes calls fail by chance.
type chaos struct {
	seed uint64
	rate float64
	ops  []string
}

// Inject adds faults to the world.
func (w *World) Inject(all ...Fault) {
	w.faults.mu.Lock()
	defer w.faults.mu.Unlock()
	for _, f := range all {
		w.faults.script = append(w.faults.script, &pending{Fault: f})
	}
}

// Chaos makes calls of the operations fail with Unavailable at the rate, from 0
// to 1. Which ones is a function of the seed, the operation, the sandbox and how
// often it was called, and so does not depend on the order of other calls.
func (w *World) Chaos(seed uint64, rate float64, ops ...string) {
	w.faults.mu.Lock()
	defer w.faults.mu.Unlock()
	w.faults.chaos = chaos{seed, rate, ops}
	w.faults.calls = map[string]uint64{}
}

// meet lets a call meet its faults. cut is for Dial, see Fault.Cut.
func (f *faults) meet(ctx context.Context, name, op, id string) (cut int64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, sandbox.E(name, "", id, err)
	}
	for _, hit := range f.match(op, id) {
		if hit.Delay > 0 {
			select {
			case <-time.After(hit.Delay):
			case <-ctx.Done():
				return 0, sandbox.E(name, "", id, ctx.Err())
			}
		}
		if hit.Die {
			f.kill(id)
		}
		if hit.Kind != "" {
			return 0, sandbox.Errorf(name, hit.Kind, id, "an injected fault")
		}
		cut = max(cut, hit.Cut)
	}
	return cut, nil
}

// match counts the call and returns the faults that hit it.
func (f *faults) match(op, id string) []Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	var hits []Fault
	for _, p := range f.script {
		if p.Op != "" && p.Op != op || p.Sandbox != "" && p.Sandbox != id {
			continue
		}
		p.seen++
		if p.seen > p.Skip && (p.Times == 0 || p.seen <= p.Skip+p.Times) {
			hits = append(hits, p.Fault)
		}
	}
	if f.chaos.rate > 0 && slices.Contains(f.chaos.ops, op) {
		key := op + " " + id
		f.calls[key]++
		h := fnv.New64a()
		fmt.Fprintf(h, "%d %s %d", f.chaos.seed, key, f.calls[key])
		if chance(h.Sum64()) < f.chaos.rate {
			hits = append(hits, Fault{Kind: sandbox.Unavailable})
		}
	}
	return hits
}

// chance spreads a hash evenly over [0, 1). FNV alone mixes its last bytes
// badly, hence the finalizer (of SplitMix64).
func chance(h uint64) float64 {
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return float64((h^h>>31)>>11) / (1 << 53)
}

// cutConn ends after a number of bytes were read.
type cutConn struct {
	net.Conn
	left int64 // bytes; one reader at a time, as for every net.Conn in use
}

func (c *cutConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		_ = c.Close()
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}
