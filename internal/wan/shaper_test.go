package wan

import (
	"slices"
	"testing"
	"time"
)

// lost returns which of n packets are lost that come a millisecond apart.
func lost(p Path, n, size int) (at []int) {
	s := newShaper(p)
	for i := range n {
		if _, ok := s.send(time.UnixMilli(int64(i)), size); !ok {
			at = append(at, i)
		}
	}
	return at
}

// conformance: W8
func TestASeedLosesTheSamePacketsWheneverAndHoweverLongTheyAre(t *testing.T) {
	p := Path{Rate: 100e6, Loss: 0.01, Queue: 625_000, Seed: 1}
	first := lost(p, 5000, 1500)
	if want := []int{57, 409, 511, 609}; !slices.Equal(first[:4], want) {
		t.Errorf("packets %v are lost first, want %v", first[:4], want)
	}
	if len(first) < 30 || len(first) > 70 {
		t.Errorf("of 5000 packets, %d are lost", len(first))
	}
	later := p
	later.Delay, later.Rate = time.Second, 1e9
	if again := lost(later, 5000, 40); !slices.Equal(first, again) {
		t.Errorf("%v, then %v", first, again)
	}
	later.Seed = 2
	if other := lost(later, 5000, 40); slices.Equal(first, other) {
		t.Error("another seed loses the same")
	}
	p.Loss = 0
	if none := lost(p, 5000, 1500); len(none) > 0 {
		t.Errorf("without loss, %v are lost", none)
	}
}

func TestPacketsArriveInOrderAfterTheDelayAtTheRate(t *testing.T) {
	s := newShaper(Path{Rate: 12e6, Delay: 50 * time.Millisecond, Queue: 1 << 20}) // 1500 bytes take 1 ms
	now := time.UnixMilli(0)
	for i := range 100 { // at once
		got, ok := s.send(now, 1500)
		if want := now.Add(time.Duration(i+1)*time.Millisecond + 50*time.Millisecond); !ok || !got.Equal(want) {
			t.Fatalf("packet %d arrives at %v, want %v; %v", i, got, want, ok)
		}
	}
	now = now.Add(time.Second) // the link is free long since
	if got, ok := s.send(now, 750); !ok || !got.Equal(now.Add(50*time.Millisecond+500*time.Microsecond)) {
		t.Errorf("it arrives at %v, %v", got, ok)
	}
	last := time.Time{}
	for i := range 1000 {
		now = now.Add(time.Duration(i%3) * 100 * time.Microsecond)
		if got, ok := s.send(now, 40+i*7%1400); ok && got.Before(last) {
			t.Fatalf("packet %d overtakes", i)
		} else if ok {
			last = got
		}
	}
}

func TestWhatWaitsIsBounded(t *testing.T) {
	s := newShaper(Path{Rate: 12e6, Queue: 15_000})
	now, taken := time.UnixMilli(0), 0
	for range 1000 {
		if _, ok := s.send(now, 1500); ok {
			taken++
		}
	}
	if taken != 11 { // one is being sent
		t.Errorf("%d packets were taken", taken)
	}
	if _, ok := s.send(now.Add(time.Millisecond), 1500); !ok {
		t.Error("there is no room after one was sent")
	}
}
