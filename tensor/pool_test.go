package tensor

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestEveryIndexIsDoneOnceHoweverManyAskAtOnce(t *testing.T) {
	for _, threads := range []int{0, 1, 2, 5} {
		p := NewPool(threads, Scalar)
		var callers sync.WaitGroup
		for range 4 {
			callers.Go(func() {
				for n := range 200 {
					done := make([]atomic.Int32, n)
					p.Run(n, 1+n%7, func(lo, hi int) {
						for i := lo; i < hi; i++ {
							done[i].Add(1)
						}
					})
					for i := range done {
						if got := done[i].Load(); got != 1 {
							t.Errorf("%d threads: index %d of %d was done %d times", threads, i, n, got)
							return
						}
					}
				}
			})
		}
		callers.Wait()
		p.Close()
		p.Close()
	}
}

func TestMemoryIsFreedOnce(t *testing.T) {
	mem, err := Alloc(5 << 20)
	if err != nil {
		t.Fatal(err)
	}
	mem.Bytes()[5<<20-1] = 1
	if err := mem.Free(); err != nil {
		t.Fatal(err)
	}
	if err := mem.Free(); err != nil || mem.Bytes() != nil {
		t.Errorf("a second Free: %v, bytes %v", err, mem.Bytes())
	}
	if _, err := Alloc(0); err == nil {
		t.Error("no bytes were allocated")
	}
	if _, err := Alloc(1 << 62); err == nil {
		t.Error("more than there can be was allocated")
	}
}
