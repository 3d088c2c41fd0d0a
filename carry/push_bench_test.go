package carry_test

import (
	"bytes"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/carry"
)

// processorTime is what this process has used.
func processorTime() time.Duration {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkNextSnapshot pushes snapshots of 50 MB, in each of which 2,000 places are another and all pages lie elsewhere, as in
// the memory of a sandbox that works.
func BenchmarkNextSnapshot(b *testing.B) {
	src, dst := pairOf(b)
	root := src.addImage(b, "base", content(1, mib)).Root
	memory := content(2, 48*mib)
	r := rand.New(rand.NewPCG(1, 2))
	next := func(parent string) string {
		for range 2000 {
			copy(memory[r.IntN(len(memory)-100):], content(r.Uint64(), 80))
		}
		moved := bytes.Clone(memory[40<<12:])
		moved = append(moved, memory[:40<<12]...)
		memory = moved
		return src.save(b, root, parent, map[string][]byte{"pages.img": memory}).ID
	}
	id := next("")
	if _, err := src.Push(ctx, carry.Snapshot, id, "b", nil); err != nil {
		b.Fatal(err)
	}
	var used time.Duration
	var wire int64
	for b.Loop() {
		b.StopTimer()
		id = next(id)
		time.Sleep(500 * time.Millisecond) // the index of what was sent is made
		before := processorTime()
		b.StartTimer()
		res, err := src.Push(ctx, carry.Snapshot, id, "b", nil)
		if err != nil {
			b.Fatal(err)
		}
		used += processorTime() - before
		wire += res.Wire
	}
	b.ReportMetric(float64(used.Milliseconds())/float64(b.N), "cpu-ms/op")
	b.ReportMetric(float64(wire)/float64(b.N), "wire-B/op")
	_ = dst
}
