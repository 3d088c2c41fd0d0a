package carry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/migrate"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
)

// ways are those in which sandboxes move, by whether their runtime sends nothing live.
var ways = map[carry.Way]bool{carry.Live: false, carry.BySnapshots: true}

// movers are two hosts with a sandbox that runs on the first.
func movers(t *testing.T, way carry.Way, fault func(migrate.Step) (migrate.Outcome, error)) (a, b *host, sb node.Sandbox) {
	t.Helper()
	a = newHostWith(t, "a", options{fault: fault, snapshots: ways[way]})
	b = newHostWith(t, "b", options{snapshots: ways[way]})
	peertest.Join(t, a.Node, b.Node, b.Addr)
	a.addImage(t, "base", content(1, 100_000))
	sb, err := a.node().Create(ctx, node.CreateRequest{Image: "base", Name: "mover", Network: sandbox.NetworkNone})
	if err != nil {
		t.Fatal(err)
	}
	return a, b, sb
}

// running counts the machines of a sandbox that run, by asking the runtimes themselves.
func running(t *testing.T, id string, hosts ...*host) (where []string) {
	t.Helper()
	for _, h := range hosts {
		list, err := h.world.Open(fake.Config{}).List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range list {
			if s.ID == id && s.State == sandbox.Running {
				where = append(where, h.Node.ID())
			}
		}
	}
	return where
}

// conformance: V3
func TestARunningSandboxMovesWithItsNameAndFiles(t *testing.T) {
	for way := range ways {
		t.Run(string(way), func(t *testing.T) { testMove(t, way) })
	}
}

func testMove(t *testing.T, way carry.Way) {
	a, b, sb := movers(t, way, nil)
	res, err := a.Migrate(ctx, "mover", "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != b.Node.ID() {
		t.Fatalf("it runs on %v", where)
	}
	got, err := b.node().Get(ctx, "mover")
	if err != nil || got.ID != sb.ID || got.State != sandbox.Running || got.Moving != "" {
		t.Errorf("%+v, %v", got, err)
	}
	if old, err := a.node().Get(ctx, sb.ID); err != nil || old.State != sandbox.Terminated {
		t.Errorf("the source has %+v, %v", old, err)
	}
	if n := len(a.snapshots.List()) + len(b.snapshots.List()); n != 0 {
		t.Errorf("%d snapshots are left", n)
	}
	if res.Way != way || (res.Why == "") != (way == carry.Live) || res.Wire == 0 || (res.Stream > 0) != (way == carry.Live) {
		t.Errorf("%+v", res)
	}
	t.Logf("measured: V3 moved between two nodes on one machine, %s: downtime %v, rounds %v, then %d bytes", way, res.Downtime.Round(time.Millisecond), res.Rounds, res.Final+res.Stream)
	// And back.
	if _, err := b.Migrate(ctx, sb.ID, "a", nil); err != nil {
		t.Fatal(err)
	}
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != a.Node.ID() {
		t.Fatalf("it runs on %v", where)
	}
}

// conformance: V3
func TestWhicheverStepFailsTheSandboxRunsInOnePlace(t *testing.T) {
	for way := range ways {
		for _, step := range steps(way) {
			for _, outcome := range []migrate.Outcome{migrate.Failed, migrate.Unknown} {
				t.Run(fmt.Sprintf("%s/%s/%d", way, step, outcome), func(t *testing.T) { testStepFails(t, way, step, outcome) })
			}
		}
	}
}

// steps are those that a move takes, and Drop.
func steps(way carry.Way) []migrate.Step {
	if way == carry.Live {
		return []migrate.Step{migrate.Prepare, migrate.Copy, migrate.Stream, migrate.Switch, migrate.Clean, migrate.Drop}
	}
	return []migrate.Step{migrate.Prepare, migrate.Copy, migrate.Freeze, migrate.Send, migrate.Switch, migrate.Clean, migrate.Drop}
}

func testStepFails(t *testing.T, way carry.Way, step migrate.Step, outcome migrate.Outcome) {
	boom := errors.New("boom")
	failed := false
	a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
		if s == step && !failed {
			failed = true
			return outcome, boom
		}
		return 0, nil
	})
	_, err := a.Migrate(ctx, "mover", "b", nil)
	where := running(t, sb.ID, a, b)
	if len(where) != 1 {
		t.Fatalf("it runs on %v", where)
	}
	if moved := where[0] == b.Node.ID(); moved != (err == nil) {
		t.Errorf("moved %v, and the answer is %v", moved, err)
	}
	if err != nil && !errors.Is(err, boom) {
		t.Errorf("the reason is lost: %v", err)
	}
	for _, h := range []*host{a, b} {
		if got, err := h.node().Get(ctx, sb.ID); err == nil && got.State == sandbox.Running && (where[0] != h.Node.ID() || got.Moving != "") {
			t.Errorf("%s believes that it runs there: %+v", h.Node.ID(), got)
		}
	}
	if err == nil {
		return
	}
	// What failed once is no obstacle.
	if _, err := a.Migrate(ctx, "mover", "b", nil); err != nil {
		t.Error(err)
	}
}

// conformance: V3
func TestGivingUpBeforeTheSwitchLetsItGoOnHere(t *testing.T) {
	for way := range ways {
		for _, step := range steps(way)[1:4] {
			if step != migrate.Switch {
				t.Run(fmt.Sprintf("%s/%s", way, step), func(t *testing.T) { testGiveUp(t, way, step) })
			}
		}
	}
}

func testGiveUp(t *testing.T, way carry.Way, step migrate.Step) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
		if s == step {
			cancel()
		}
		return 0, nil
	})
	if _, err := a.Migrate(ctx, "mover", "b", nil); err == nil {
		t.Error("no error")
	}
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != a.Node.ID() {
		t.Errorf("it runs on %v", where)
	}
}

// conformance: V3
func TestAMoveInDoubtIsResolvedByAskingOrByForce(t *testing.T) {
	for way := range ways {
		t.Run(string(way), func(t *testing.T) { testDoubt(t, way) })
	}
}

func testDoubt(t *testing.T, way carry.Way) {
	silent, doubt := atomic.Bool{}, make(chan struct{}, 2)
	a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
		if silent.Load() && (s == migrate.Switch || s == migrate.Ask) {
			if s == migrate.Switch {
				doubt <- struct{}{}
			}
			return migrate.Unknown, errors.New("no answer")
		}
		return 0, nil
	})
	if _, err := a.Resolve(ctx, "mover", carry.ResolveOptions{}); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("what does not move is resolved: %v", err)
	}
	silent.Store(true)
	moved := make(chan error, 1)
	go func() {
		_, err := a.Migrate(ctx, "mover", "b", nil)
		moved <- err
	}()
	<-doubt
	if leaving := a.node().Leaving(); len(leaving) != 1 || leaving[0].ID != sb.ID {
		t.Errorf("leaving: %+v", leaving)
	}
	soon, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	if _, err := a.Resolve(soon, "mover", carry.ResolveOptions{Abort: true}); err == nil {
		t.Error("resolved without an answer")
	}
	stop()
	if where := running(t, sb.ID, a, b); len(where) != 0 {
		t.Errorf("in doubt it runs on %v", where)
	}
	silent.Store(false)
	if res, err := a.Resolve(ctx, "mover", carry.ResolveOptions{Abort: true}); err != nil || res.Moved != "" {
		t.Errorf("%+v, %v", res, err)
	}
	if err := <-moved; err == nil {
		t.Error("the move that was given up succeeded")
	}
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != a.Node.ID() {
		t.Errorf("it runs on %v", where)
	}
	// The other node is gone for ever.
	silent.Store(true)
	go func() {
		_, err := a.Migrate(ctx, "mover", "b", nil)
		moved <- err
	}()
	<-doubt
	if res, err := a.Resolve(ctx, "mover", carry.ResolveOptions{Abort: true, Force: true}); err != nil || res.Moved != "" {
		t.Errorf("%+v, %v", res, err)
	}
	<-moved
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != a.Node.ID() {
		t.Errorf("it runs on %v", where)
	}
}

// conformance: V3
func TestASandboxThatHasGoneOnDoesNotComeBackToLifeWhereItWas(t *testing.T) {
	for way := range ways {
		for _, ends := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%t", way, ends), func(t *testing.T) { testGoneOn(t, way, ends) })
		}
	}
}

// testGoneOn has the source die before it hears that the sandbox has arrived, which then moves on, or ends.
func testGoneOn(t *testing.T, way carry.Way, ends bool) {
	dead := false
	var end func()
	a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
		if dead || s == migrate.Clean {
			dead = true
			end()
			return migrate.Unknown, errors.New("killed")
		}
		return 0, nil
	})
	c := newHostWith(t, "c", options{snapshots: ways[way]})
	peertest.Join(t, b.Node, c.Node, c.Addr)
	end = func() { _ = a.Carrier.Close() }
	if _, err := a.Migrate(ctx, "mover", "b", nil); err == nil {
		t.Fatal("it has not been killed")
	}
	var want []string
	if ends {
		if err := b.node().Remove(ctx, sb.ID); err != nil {
			t.Fatal(err)
		}
	} else {
		if _, err := b.Migrate(ctx, "mover", "c", nil); err != nil {
			t.Fatal(err)
		}
		want = []string{c.Node.ID()}
	}
	a.fault = nil
	again := a.carrier() // the next process on the same state
	again.Use(a.Group)
	again.Recover(ctx)
	if where := running(t, sb.ID, a, b, c); !slices.Equal(where, want) {
		t.Errorf("it runs on %v, not on %v", where, want)
	}
	if got, err := a.node().Get(ctx, sb.ID); err != nil || got.Moved != b.Node.ID() || got.Moving != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// conformance: V3
func TestThatASandboxWasThereBeforeDoesNotCountAsItsArrival(t *testing.T) {
	for way := range ways {
		t.Run(string(way), func(t *testing.T) { testWasThere(t, way) })
	}
}

func testWasThere(t *testing.T, way carry.Way) {
	boom := false
	a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
		if boom && s == migrate.Switch {
			return migrate.Unknown, errors.New("no answer")
		}
		return 0, nil
	})
	for _, m := range []struct {
		from *host
		to   string
	}{{a, "b"}, {b, "a"}} {
		if _, err := m.from.Migrate(ctx, sb.ID, m.to, nil); err != nil {
			t.Fatal(err)
		}
	}
	boom = true
	if _, err := a.Migrate(ctx, sb.ID, "b", nil); err == nil {
		t.Error("the move succeeds without a switch")
	}
	if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != a.Node.ID() {
		t.Errorf("it runs on %v", where)
	}
	if got, err := a.node().Get(ctx, sb.ID); err != nil || got.Moves != 2 || got.Moving != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// conformance: V3
func TestASourceThatWasKilledInDoubtFindsOut(t *testing.T) {
	for way := range ways {
		for _, arrived := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%t", way, arrived), func(t *testing.T) { testKilledInDoubt(t, way, arrived) })
		}
	}
}

func testKilledInDoubt(t *testing.T, way carry.Way, arrived bool) {
	{
		dead := false
		var end func()
		a, b, sb := movers(t, way, func(s migrate.Step) (migrate.Outcome, error) {
			if dead || s == migrate.Switch && !arrived || s == migrate.Clean {
				dead = true
				end() // the process ends: nothing of the move is done any more
				return migrate.Unknown, errors.New("killed")
			}
			return 0, nil
		})
		end = func() { _ = a.Carrier.Close() }
		if _, err := a.Migrate(ctx, "mover", "b", nil); err == nil {
			t.Fatal("it has not been killed")
		}
		if got, err := a.node().Get(ctx, sb.ID); err != nil || got.Moving != b.Node.ID() {
			t.Fatalf("%+v, %v", got, err)
		}
		if _, err := a.node().Resume(ctx, sb.ID); !sandbox.Is(err, sandbox.Conflict) {
			t.Errorf("in doubt it can be resumed: %v", err)
		}
		if err := a.node().Remove(ctx, sb.ID); !sandbox.Is(err, sandbox.Conflict) {
			t.Errorf("in doubt it can be removed: %v", err)
		}
		a.fault = nil
		again := a.carrier() // the next process on the same state
		again.Use(a.Group)
		again.Recover(ctx)
		want := a.Node.ID()
		if arrived {
			want = b.Node.ID()
		}
		if where := running(t, sb.ID, a, b); len(where) != 1 || where[0] != want {
			t.Errorf("arrived %v: it runs on %v", arrived, where)
		}
	}
}
