package carry

import (
	"testing"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/chunk"
)

// numbers are those of the pieces of a run.
func numbers(run []piece) (list []int) {
	for _, p := range run {
		list = append(list, p.n)
	}
	return list
}

func expect(t *testing.T, what string, run []piece, want ...int) {
	t.Helper()
	got := numbers(run)
	same := len(got) == len(want)
	for i := 0; same && i < len(got); i++ {
		same = got[i] == want[i]
	}
	if !same {
		t.Errorf("%s: pieces %v, want %v", what, got, want)
	}
}

// conformance: W5
func TestWhatSomebodyWaitsForOvertakesThePlanAndThePlanAllElse(t *testing.T) {
	const pieces = 100
	q, now := newQueue(), time.Now()
	q.add("memory", nil, chunk.Part{Chunks: make([]chunk.Ref, pieces)})
	want := func(n int, ahead bool) {
		q.want(arrive.Want{File: "memory", Offset: int64(n)*arrive.PieceSize + 5, Ahead: ahead}, now)
	}
	for _, n := range []int{50, 40, 60} {
		want(n, true)
	}
	want(70, false)
	want(60, false) // it was foreseen, and is needed sooner
	run, _, _ := q.take(false, now)
	expect(t, "what is needed comes alone", run, 70)
	run, _, _ = q.take(true, now)
	expect(t, "what was foreseen is needed now", run, 60)
	run, _, _ = q.take(true, now)
	expect(t, "those who bring what is needed bring nothing else", run)
	run, _, _ = q.take(false, now)
	expect(t, "neighbours come before the plan, in one request", run, 61, 62, 71, 72, 50, 40)
	want(50, true)
	want(61, false)
	run, _, _ = q.take(false, now)
	expect(t, "what is under way is not asked for again", run, 0, 1, 2, 3, 4, 5, 6, 7)
	spare := run
	run, done, _ := q.take(false, now)
	expect(t, "while somebody waits one request is enough for what nobody asked for", run)
	if done {
		t.Error("it is done before all came")
	}
	for _, p := range spare {
		q.ended(p)
	}
	run, _, _ = q.take(false, now)
	expect(t, "the end follows the beginning", run, 92, 93, 94, 95, 96, 97, 98, 99)
	now = now.Add(2 * lateCalm)
	run, _, _ = q.take(false, now)
	expect(t, "when nobody waits there are more", run, 8, 9, 10, 11, 12, 13, 14, 15)
}

func TestAllPiecesComeOnceInWhateverOrderTheyAreWanted(t *testing.T) {
	const pieces = 203
	q, now := newQueue(), time.Now()
	q.add("a", nil, chunk.Part{Chunks: make([]chunk.Ref, pieces)})
	q.add("b", nil, chunk.Part{Chunks: make([]chunk.Ref, 5)})
	for i := range 3 * pieces {
		q.want(arrive.Want{File: []string{"a", "b", "c"}[i%3], Offset: int64(i*7%pieces-3) * arrive.PieceSize, Ahead: i%2 == 0}, now)
	}
	came := make(map[[2]int]int)
	for turn := 0; ; turn++ {
		run, done, _ := q.take(turn%3 == 0, now)
		if done {
			break
		}
		for _, p := range run {
			if p.file != run[0].file {
				t.Error("a request is of two files")
			}
			came[[2]int{len(p.file.came), p.n}]++
			q.ended(p)
		}
		if turn > 10*pieces {
			t.Fatal("it does not end")
		}
	}
	if len(came) != pieces+5 {
		t.Errorf("%d pieces came of %d", len(came), pieces+5)
	}
	for p, n := range came {
		if n != 1 {
			t.Errorf("piece %v came %d times", p, n)
		}
	}
	if c := q.counts(); c[needed]+c[ahead]+c[behind] != pieces+5 || c[needed] == 0 || c[ahead] == 0 || c[behind] == 0 {
		t.Errorf("counts %v", c)
	}
}
