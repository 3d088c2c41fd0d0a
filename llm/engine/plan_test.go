package engine

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/grammar"
)

// Whatever the state, a plan stays within its limits, the eldest advances, and
// nothing that was put back computes.
func TestPlansStayWithinTheirLimits(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 20_000 {
		l := limits{tokens: 1 + rnd.IntN(64), chunk: 1 + rnd.IntN(16), pageTokens: 16, freePages: rnd.IntN(6)}
		running := make([]work, 1+rnd.IntN(6))
		for i := range running {
			w := work{pending: 1, drafts: rnd.IntN(4), room: rnd.IntN(17), gives: rnd.IntN(4)}
			if rnd.IntN(2) == 0 {
				w.pending, w.drafts = 2+rnd.IntN(100), 0
			}
			running[i] = w
		}
		running[0].room = max(running[0].room, 1) // the pool holds one whole window
		s := plan(running, l)
		tokens, pages, given := 0, 0, 0
		for _, i := range s.putBack {
			given += running[i].gives
			if s.compute[i] > 0 {
				t.Fatalf("%+v %+v: %+v computes what was put back", l, running, s)
			}
		}
		for i, n := range s.compute {
			w := running[i]
			if n > max(w.pending, 1+w.drafts) {
				t.Fatalf("%+v %+v: %+v computes more than there is", l, running, s)
			}
			tokens += n
			pages += (max(0, n-w.room) + l.pageTokens - 1) / l.pageTokens
		}
		if tokens > l.tokens || pages > l.freePages+given || tokens == 0 {
			t.Fatalf("%+v %+v: %+v", l, running, s)
		}
	}
}

func TestPromptsLeaveOthersTheirPace(t *testing.T) {
	s := plan([]work{{pending: 1, room: 8}, {pending: 1000, room: 1000}, {pending: 1, room: 1}}, limits{tokens: 512, chunk: 100, pageTokens: 16})
	if !slices.Equal(s.compute, []int{1, 96, 1}) {
		t.Errorf("%v", s.compute)
	}
	s = plan([]work{{pending: 1000, room: 1000}}, limits{tokens: 512, chunk: 100, pageTokens: 16})
	if s.compute[0] != 512 {
		t.Errorf("a prompt alone gets %d tokens", s.compute[0])
	}
}

func TestTheYoungestGivesItsPagesToTheEldest(t *testing.T) {
	s := plan([]work{{pending: 1, room: 0, gives: 5}, {pending: 1, room: 3, gives: 2}, {pending: 1, room: 3, gives: 4}}, limits{tokens: 9, chunk: 9, pageTokens: 16})
	if !slices.Equal(s.compute, []int{1, 1, 0}) || !slices.Equal(s.putBack, []int{2}) {
		t.Errorf("%+v", s)
	}
}

func request(tenant string, tokens int) *sequence {
	return &sequence{req: Request{Tenant: tenant, Limit: tokens}}
}

// conformance: L5
func TestTenantsShareByWeightWhateverTheyAskFor(t *testing.T) {
	q := newQueue(10_000, map[string]int{"heavy": 3})
	for range 1000 {
		for range 4 {
			q.push(request("greedy", 400))
		}
		q.push(request("heavy", 100))
		q.push(request("modest", 50))
	}
	got := map[string]int{}
	for range 1000 {
		s := q.next()
		got[s.req.Tenant] += s.cost()
		q.pop()
		if q.lines["modest"] == nil || q.lines["heavy"] == nil {
			break
		}
	}
	if r := float64(got["greedy"]) / float64(got["modest"]); r < 0.8 || r > 1.25 {
		t.Errorf("greedy got %.2f times what modest did", r)
	}
	if r := float64(got["heavy"]) / float64(got["modest"]); r < 2.5 || r > 3.5 {
		t.Errorf("a weight of 3 got %.2f times what 1 did", r)
	}
}

func TestAQueueIsBoundedForAllAndForEach(t *testing.T) {
	q := newQueue(8, nil)
	n := 0
	for q.push(request("a", 1)) {
		n++
	}
	if n != 4 || !q.push(request("b", 1)) {
		t.Errorf("one tenant has %d of 8 places", n)
	}
	var order []string
	for s := q.next(); s != nil; s = q.next() {
		order = append(order, s.req.Tenant)
		q.pop()
	}
	if q.size != 0 || len(q.lines) != 0 || len(q.turns) != 0 || len(order) != 5 {
		t.Errorf("%v, and %d are left", order, q.size)
	}
}

// However a text is cut into pieces, what comes out is the text up to the first
// stop string, and only whole characters.
func TestStopStringsAreFoundAcrossPieces(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	const text = "Grüße an alle 日本 und END der Welt <|end"
	for _, c := range []struct {
		stops []string
		want  string
		found bool
	}{
		{nil, text, false}, {[]string{"END"}, "Grüße an alle 日本 und ", true}, {[]string{"ENDE", "lle 日本 u"}, "Grüße an a", true},
		{[]string{"<|end|>", ""}, text, false}, {[]string{"G"}, "", true},
	} {
		for range 200 {
			e, got, rest, stopped := newEnding(c.stops), "", text, false
			for len(rest) > 0 && !stopped {
				n := min(len(rest), 1+rnd.IntN(5))
				var out string
				out, stopped = e.add([]byte(rest[:n]))
				if strings.ContainsRune(out, '\uFFFD') {
					t.Fatalf("%q was cut through a character", out)
				}
				got, rest = got+out, rest[n:]
			}
			if !stopped {
				got += e.rest()
			}
			if got != c.want || stopped != c.found {
				t.Fatalf("stops %q: %q, %v", c.stops, got, stopped)
			}
		}
	}
}

func TestGuessesAreWhatFollowedBefore(t *testing.T) {
	if g := guess([]int32{1, 2, 3, 4, 5, 9, 1, 2, 3}, 2); len(g) != 2 || g[0].token != 4 || g[1].token != 5 {
		t.Errorf("%v", g)
	}
	if g := guess([]int32{1, 2, 3, 4}, 5); g != nil {
		t.Errorf("%v", g)
	}
}

// frequencies samples often and returns how often each token came.
func frequencies(s Sampling, logits []float32, mask grammar.Mask) []float64 {
	const n = 20_000
	out, x := make([]float64, len(logits)), newSampler(s)
	for range n {
		if t := x.choose(slices.Clone(logits), mask, nil); t >= 0 {
			out[t] += 1.0 / n
		}
	}
	return out
}

func TestSamplingFollowsItsSettings(t *testing.T) {
	// Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
	logits := []float32{4 * 0.6931472, 3 * 0.6931472, 2 * 0.6931472, 0.6931472, 0.6931472}
	for name, c := range map[string]struct {
		s    Sampling
		mask grammar.Mask
		want []float64
	}{
		"greedy":     {Sampling{}, nil, []float64{1, 0, 0, 0, 0}},
		"as it is":   {Sampling{Temperature: 1}, nil, []float64{.5, .25, .125, .0625, .0625}},
		"colder":     {Sampling{Temperature: 0.5}, nil, []float64{.744, .186, .047, .012, .012}},
		"top-k":      {Sampling{Temperature: 1, TopK: 2}, nil, []float64{.667, .333, 0, 0, 0}},
		"top-p":      {Sampling{Temperature: 1, TopP: 0.8}, nil, []float64{.571, .286, .143, 0, 0}},
		"min-p":      {Sampling{Temperature: 1, MinP: 0.3}, nil, []float64{.667, .333, 0, 0, 0}},
		"mask":       {Sampling{Temperature: 1}, grammar.Mask{0b10100}, []float64{0, 0, .667, 0, .333}},
		"bias":       {Sampling{Bias: map[int32]float32{4: 100}}, nil, []float64{0, 0, 0, 0, 1}},
		"empty mask": {Sampling{Temperature: 1}, grammar.Mask{0}, []float64{0, 0, 0, 0, 0}},
		"everything": {Sampling{Temperature: 1, TopK: 4, TopP: 0.9, MinP: 0.01}, nil, []float64{.571, .286, .143, 0, 0}},
	} {
		for i, got := range frequencies(c.s, logits, c.mask) {
			if d := got - c.want[i]; d > 0.015 || d < -0.015 {
				t.Errorf("%s: token %d comes %.3f of the time, want %.3f", name, i, got, c.want[i])
			}
		}
	}
}

func TestPenaltiesMakeTokensLessLikely(t *testing.T) {
	x := newSampler(Sampling{Frequency: 1, Presence: 0.5})
	x.note(0)
	x.note(0)
	if got := x.choose([]float32{3, 1}, nil, nil); got != 1 {
		t.Errorf("%d", got)
	}
	if got := newSampler(Sampling{Repetition: 2}).choose([]float32{3, 2, -1}, nil, []int32{0, 0}); got != 1 {
		t.Errorf("%d", got)
	}
}

func TestTheSameSeedChoosesAlike(t *testing.T) {
	logits := make([]float32, 100)
	a, b := newSampler(Sampling{Temperature: 1, Seed: 42}), newSampler(Sampling{Temperature: 1, Seed: 42})
	for range 100 {
		if a.choose(slices.Clone(logits), nil, nil) != b.choose(slices.Clone(logits), nil, nil) {
			t.Fatal("two with the same seed differ")
		}
	}
}

// However guesses are made, tokens come as often as the model says.
func TestVerifiedGuessesDoNotChangeWhatIsLikely(t *testing.T) {
	p := []float32{2, 1, 0.5, -1, 0}
	for name, q := range map[string][]float32{"alike": {2, 1, 0.4, -1, 0}, "other": {-1, 0, 3, 1, 0}, "the same": p, "sure": {0, 90, 0, 0, 0}} {
		for _, settings := range []Sampling{{Temperature: 1}, {Temperature: 0.7, TopP: 0.9}, {Temperature: 1.5, TopK: 3}, {}} {
			want := frequencies(settings, p, nil)
			x, got, taken := newSampler(settings), make([]float64, len(p)), 0
			const n = 20_000
			for range n {
				from := slices.Clone(x.distribution(slices.Clone(q), nil, nil))
				d := draft{x.draw(from), from}
				token := x.verify(slices.Clone(p), nil, d)
				got[token] += 1.0 / n
				if token == d.token {
					taken++
				}
			}
			for i := range got {
				if d := got[i] - want[i]; d > 0.015 || d < -0.015 {
					t.Errorf("%s %+v: token %d comes %.3f of the time, want %.3f", name, settings, i, got[i], want[i])
				}
			}
			if name == "the same" && taken != n {
				t.Errorf("%+v: of guesses by the model itself %d of %d were taken", settings, taken, n)
			}
		}
	}
}

func TestGuessingGoesAsFarAsItPays(t *testing.T) {
	for _, c := range []struct {
		right, cost float64
		want        func(n int) bool
	}{
		{0.95, 0.1, func(n int) bool { return n >= 5 }}, {0.5, 0.1, func(n int) bool { return n >= 1 && n <= 3 }},
		{0.1, 0.3, func(n int) bool { return n == 0 }}, {0.9, 1.2, func(n int) bool { return n == 0 }}, {1, 0, func(n int) bool { return n == 8 }},
	} {
		if n := ahead(c.right, c.cost, 8); !c.want(n) {
			t.Errorf("right %.2f of the time at %.2f of a pass: %d", c.right, c.cost, n)
		}
	}
}
