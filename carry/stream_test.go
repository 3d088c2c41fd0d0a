package carry_test

import (
	"bytes"
	"cmp"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// line is a row of snapshots of one sandbox, each a little different from the one before.
type line struct {
	t      testing.TB
	host   *host
	root   sandbox.Root
	memory []byte
	last   snapshot.Manifest
	n      uint64
	skew   time.Duration // of the host's clock
}

func newLine(t testing.TB, h *host, size int) *line {
	t.Helper()
	return &line{t: t, host: h, root: h.addImage(t, "base", content(1, mib)).Root, memory: content(2, size)}
}

// next saves the sandbox after it changed some bytes.
func (l *line) next(changed int) string {
	l.t.Helper()
	l.n++
	l.memory = bytes.Clone(l.memory)
	for at := 0; changed > 0; at += 100_000 {
		n := min(changed, 1000)
		copy(l.memory[at%(len(l.memory)-n):], content(100+l.n+uint64(at), n))
		changed -= n
	}
	l.last = l.host.saveAt(l.t, time.Now().Add(l.skew), l.root, l.last.ID, map[string][]byte{"pages.img": l.memory})
	return l.last.ID
}

func push(t testing.TB, from *host, id string) carry.Result {
	t.Helper()
	res, err := from.Push(ctx, carry.Snapshot, id, "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// conformance: W8
func TestTheNextSnapshotIsOneRequest(t *testing.T) {
	a, b := pairOf(t)
	l := newLine(t, a, 4*mib)
	push(t, a, l.next(0))
	b.asked()
	for range 3 {
		id := l.next(5000)
		res := push(t, a, id)
		same(t, a, b, id)
		if asked := b.asked(); !slices.Equal(asked, []string{"streams"}) {
			t.Errorf("asked for %v", asked)
		}
		if res.Wire > 12_000 || res.Held == 0 || len(res.Files) != 1 {
			t.Errorf("%+v", res)
		}
	}
}

func TestAReceiverThatLostItsBaseSaysWhatItHas(t *testing.T) {
	a, b := pairOf(t)
	l := newLine(t, a, 2*mib)
	first := l.next(0)
	push(t, a, first)
	second := l.next(3000)
	push(t, a, second)
	if err := b.snapshots.Remove(second); err != nil {
		t.Fatal(err)
	}
	third := l.next(3000)
	b.asked()
	res := push(t, a, third) // described by the first, which is still there
	same(t, a, b, third)
	if asked := b.asked(); !slices.Equal(asked, []string{"streams", "commit"}) || res.Wire > 40_000 {
		t.Errorf("asked for %v: %+v", asked, res)
	}
}

func TestWhatIsTooMuchForOneRequestGoesInChunks(t *testing.T) {
	a, b := pairOf(t)
	l := newLine(t, a, 24*mib)
	push(t, a, l.next(0))
	l.memory = content(77, len(l.memory)) // nothing in common
	id := l.next(0)
	b.asked()
	push(t, a, id)
	same(t, a, b, id)
	if asked := b.asked(); slices.Index(asked, "offers") < 0 || asked[len(asked)-1] != "commit" {
		t.Errorf("asked for %v", asked)
	}
}

func TestAStreamThatIsBrokenOffLeavesNothingAndTheRestArrives(t *testing.T) {
	a, b := newHost(t, "a", 0), newHost(t, "b", 0)
	wire := newCutter(t, b.Addr)
	peertest.Join(t, a.Node, b.Node, wire.Addr().String())
	l := newLine(t, a, 8*mib)
	push(t, a, l.next(0))
	id := l.next(3 * mib)
	wire.after.Store(350_000) // of each connection from now on
	wire.drop()
	push(t, a, id)
	same(t, a, b, id)
	if wire.cut.Load() == 0 {
		t.Error("nothing was broken off")
	}
}

// A line that is dead for a while, so that nothing answers, costs the wait, of which the reason is said, and nothing else. The
// patience of a push in production is minutes.
func TestALinkThatIsDeadForAWhileAndBackLosesNothing(t *testing.T) {
	a, b := newHost(t, "a", 0), newHost(t, "b", 0)
	wire := newCutter(t, b.Addr)
	peertest.Join(t, a.Node, b.Node, wire.Addr().String())
	l := newLine(t, a, 8*mib)
	push(t, a, l.next(0))
	wire.dead.Store(true)
	wire.drop()
	back := time.AfterFunc(1500*time.Millisecond, func() { wire.dead.Store(false) })
	defer back.Stop()
	id, why := l.next(100_000), ""
	if _, err := a.Push(ctx, carry.Snapshot, id, "b", func(p carry.Progress) { why = cmp.Or(p.Waiting, why) }); err != nil {
		t.Fatal(err)
	}
	same(t, a, b, id)
	if why == "" {
		t.Error("nobody is told why it waits")
	}
	if wire.refused.Load() == 0 {
		t.Error("the line was not dead")
	}
}

// What the version before took foretells what the next one takes. When it is far more, the stream ends in the middle and the
// push goes on in chunks.
func TestAVersionThatIsUnlikeTheOneBeforeEndsTheStreamAndArrives(t *testing.T) {
	a, b := pairOf(t)
	l := newLine(t, a, 32*mib)
	push(t, a, l.next(0))
	push(t, a, l.next(5000))
	l.memory = content(78, len(l.memory)) // nothing in common
	id := l.next(0)
	b.asked()
	res := push(t, a, id)
	same(t, a, b, id)
	if asked := b.asked(); asked[0] != "streams" || asked[len(asked)-1] != "commit" || res.Wire < 8*mib {
		t.Errorf("asked for %v: %+v", asked, res)
	}
	push(t, a, l.next(5000)) // and the one after it is a small one again
	b.asked()
	push(t, a, l.next(5000))
	if asked := b.asked(); !slices.Equal(asked, []string{"streams"}) {
		t.Errorf("asked for %v", asked)
	}
}
