package runtimetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

var crowdTests = []test{
	{"twenty sandboxes at once", nil, testTwenty},
	{"of many creates with one ID one wins", nil, testSameID},
	{"calls about one sandbox do not harm each other", nil, testSameSandbox},
}

func testTwenty(t *testing.T, s *suite) {
	const n = 20
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			spec := s.spec()
			if errs[i] = s.Runtime.Create(deadline(t), spec); errs[i] != nil {
				return
			}
			b := s.box(t, spec)
			if got, want := b.try(fmt.Sprintf("echo %d > mine; cat mine", i)).Stdout, fmt.Sprintf("%d\n", i); got != want {
				errs[i] = fmt.Errorf("sandbox %d says %q", i, got)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	all, err := s.Runtime.List(deadline(t))
	if err != nil || len(all) != n {
		t.Fatalf("List: %d sandboxes, %v; want %d", len(all), err, n)
	}
	for i, st := range all {
		wg.Go(func() { errs[i] = s.Runtime.Destroy(deadline(t), st.ID) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Runtime.List(deadline(t)); err != nil || len(all) != 0 {
		t.Errorf("after destroying all List = %d sandboxes, %v", len(all), err)
	}
}

func testSameID(t *testing.T, s *suite) {
	spec := s.spec()
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			err := s.Runtime.Create(deadline(t), spec)
			switch {
			case err == nil:
				won.Add(1)
			case !sandbox.Is(err, sandbox.Exists):
				t.Errorf("Create: %v, want exists", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d creates with one ID succeeded", won.Load())
	}
	s.box(t, spec).must("true")
}

// testSameSandbox lets calls of all kinds meet in one sandbox that is destroyed
// in their midst. Each may fail, but only as the contract says, and nothing is left.
func testSameSandbox(t *testing.T, s *suite) {
	b := s.create(t)
	ctx := deadline(t)
	calls := []func() error{
		func() error { _, err := s.Runtime.Stats(ctx, b.id); return err },
		func() error { _, err := s.Runtime.List(ctx); return err },
		func() error {
			conn, err := s.Runtime.Dial(ctx, b.id, sandbox.GuestPort)
			if err == nil {
				err = conn.Close()
			}
			return err
		},
	}
	if s.caps.Pause {
		calls = append(calls,
			func() error { return s.Runtime.Pause(ctx, b.id) },
			func() error { return s.Runtime.Resume(ctx, b.id) })
	}
	if s.caps.Snapshot {
		dir := t.TempDir()
		calls = append(calls, func() error { return s.Runtime.Snapshot(ctx, b.id, dir, sandbox.SnapshotOptions{}) })
	}
	var wg sync.WaitGroup
	for round := range 3 {
		for _, call := range calls {
			wg.Go(func() {
				err := call()
				for _, kind := range []sandbox.Kind{"", sandbox.NotFound, sandbox.Conflict, sandbox.Unavailable, sandbox.Invalid} {
					if sandbox.KindOf(err) == kind {
						return
					}
				}
				t.Errorf("a call that met others failed with %v (kind %s)", err, sandbox.KindOf(err))
			})
		}
		if round == 1 {
			wg.Go(func() {
				if err := s.Runtime.Destroy(ctx, b.id); err != nil {
					t.Errorf("Destroy: %v", err)
				}
			})
		}
	}
	wg.Wait()
	s.wantGone(t, b.id)
}
