package pace

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"time"
)

// drain sends n bytes from a queue in which each of the classes always has pieces waiting, and returns what each got.
func drain(q *Queue[Class], n int, size map[Class]int) (sent [classes]int) {
	for c, s := range size {
		for range 3 {
			q.Push(c, s, c)
		}
	}
	for total := 0; total < n; {
		c, s, ok := q.Pop()
		if !ok {
			return sent
		}
		sent[c] += s
		total += s
		q.Push(c, size[c], c)
	}
	return sent
}

// conformance: W3
func TestEachClassGetsItsShareAndTheUnusedIsLent(t *testing.T) {
	const n = 100_000_000
	for name, c := range map[string]struct {
		size map[Class]int
		want map[Class]float64
	}{
		"all": {map[Class]int{Migration: 256 << 10, Inference: 64 << 10, API: 9000, Monitoring: 300, Backup: 256 << 10},
			map[Class]float64{Migration: .50, Inference: .30, API: .15, Monitoring: .03, Backup: .02}},
		"two":   {map[Class]int{Migration: 256 << 10, Backup: 256 << 10}, map[Class]float64{Migration: 50. / 52, Backup: 2. / 52}},
		"three": {map[Class]int{Inference: 1000, API: 100_000, Monitoring: 10}, map[Class]float64{Inference: 30. / 48, API: 15. / 48, Monitoring: 3. / 48}},
		"alone": {map[Class]int{Backup: 1 << 20}, map[Class]float64{Backup: 1}},
	} {
		sent := drain(NewQueue[Class](DefaultShares), n, c.size)
		for class := range classes {
			if got := float64(sent[class]) / n; math.Abs(got-c.want[class]) > 0.012 {
				t.Errorf("%s: %s gets %.3f, want %.3f", name, class, got, c.want[class])
			}
		}
	}
}

// conformance: W3
func TestAClassThatWasIdleIsServedAtOnceAndOwesNothing(t *testing.T) {
	q := NewQueue[Class](DefaultShares)
	drain(q, 50_000_000, map[Class]int{Backup: 256 << 10, Migration: 256 << 10})
	q.Push(API, 1000, API)
	for i := 0; ; i++ {
		if c, _, _ := q.Pop(); c == API {
			break
		}
		if i == 3 {
			t.Fatal("others that borrowed go first")
		}
	}
}

func TestAnEmptyQueueHasNothing(t *testing.T) {
	if _, _, ok := NewQueue[int](DefaultShares).Pop(); ok {
		t.Error("it has something")
	}
}

func TestAPacerLetsEverythingGoAndForgetsWhoLeft(t *testing.T) {
	p := New(100e6, DefaultShares)
	ctx, leave := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := p.Wait(context.Background(), Migration, 200_000); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Go(func() {
		if err := p.Wait(ctx, Backup, 1<<40); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	// The others come while the large piece goes, and do not wait for the hours that it would take.
	if err := p.Wait(context.Background(), Backup, 3*slice); err != nil {
		t.Error(err)
	}
	leave()
	wg.Wait()
	if err := New(0, DefaultShares).Wait(ctx, API, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	began := time.Now()
	for range 1000 {
		if err := New(0, DefaultShares).Wait(context.Background(), API, 1<<40); err != nil {
			t.Error(err)
		}
	}
	t.Logf("measured: W3 without a limit a piece waits %v", time.Since(began)/1000)
}
