package engine_test

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/grammar"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// world is one small real model, shared by the tests of this package.
var world struct {
	once   sync.Once
	model  *model.Model
	tokens *tokenizer.Tokenizer
	err    error
}

func start(t *testing.T, c engine.Config) *engine.Engine {
	t.Helper()
	path := modeltest.Path(t, "smollm2-135m-instruct-q4_1.gguf")
	world.once.Do(func() {
		r, err := gguf.Open(path)
		if err != nil {
			world.err = err
			return
		}
		src, err := model.FromGGUFData(r.File, r)
		if err == nil {
			world.model, err = model.Open(src, model.Options{Pool: tensor.NewPool(2, tensor.Best())})
		}
		if err == nil {
			world.tokens, err = tokenizer.FromGGUF(&r.Meta)
		}
		world.err = err
	})
	if world.err != nil {
		t.Fatal(world.err)
	}
	if c.Window == 0 {
		c.Window = 512
	}
	e, err := engine.New(world.model, world.tokens, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func tokensOf(t *testing.T, text string) []int32 {
	t.Helper()
	tokens, err := world.tokens.Encode(text, true)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func question(t *testing.T, text string) []int32 {
	return tokensOf(t, "<|im_start|>user\n"+text+"<|im_end|>\n<|im_start|>assistant\n")
}

// answer is a whole answer.
type answer struct {
	text   string
	tokens []engine.Token
	finish engine.Finish
	usage  engine.Usage
}

func ask(t *testing.T, e *engine.Engine, r engine.Request) answer {
	t.Helper()
	s, err := e.Submit(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var a answer
	for a.finish == "" {
		p, err := s.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		a.text, a.tokens, a.finish = a.text+p.Text, append(a.tokens, p.Tokens...), p.Finish
	}
	a.usage = s.Usage()
	return a
}

// conformance: L1 L5
func TestAnswersAreTheSameAloneTogetherAndWithGuesses(t *testing.T) {
	start(t, engine.Config{})
	prompts := []string{"What is the capital of France?", "Repeat this: one two three four, one two three four, one two", "What is the capital of Italy?", "What is 2 + 2?"}
	want := make([]answer, len(prompts))
	alone := start(t, engine.Config{Sequences: 1})
	for i, p := range prompts {
		want[i] = ask(t, alone, engine.Request{Prompt: question(t, p), Limit: 24, Likely: -1})
	}
	if !strings.Contains(want[0].text, "Paris") {
		t.Errorf("the capital of France is %q", want[0].text)
	}
	for name, c := range map[string]engine.Config{"together": {}, "guessing": {Guess: 4}, "small pieces": {Chunk: 3, Batch: 16}} {
		e := start(t, c)
		var wg sync.WaitGroup
		for i, p := range prompts {
			prompt := question(t, p)
			wg.Go(func() {
				// Products of one token and of many may round differently, so
				// texts may part where two tokens are equally likely.
				got := ask(t, e, engine.Request{Prompt: prompt, Limit: 24, Likely: -1})
				same := 0
				for same < min(len(got.tokens), len(want[i].tokens)) && got.tokens[same].ID == want[i].tokens[same].ID {
					same++
				}
				if same < 8 && same < len(want[i].tokens) {
					t.Errorf("%s: %q, want %q", name, got.text, want[i].text)
				}
			})
		}
		wg.Wait()
	}
}

// conformance: L5 L8
func TestAKnownPrefixIsNotComputedAgainAndIsKept(t *testing.T) {
	c := engine.Config{Digest: "d", KeepDir: filepath.Join(t.TempDir(), "pages")}
	e := start(t, c)
	r := engine.Request{Prompt: question(t, strings.Repeat("The reef is a ring around the lagoon. ", 12)+"What is the reef?"), Limit: 8, Likely: -1}
	first := ask(t, e, r)
	again := ask(t, e, r)
	if first.usage.Cached != 0 || again.usage.Cached < 64 || again.text != first.text {
		t.Errorf("%+v %q, then %+v %q", first.usage, first.text, again.usage, again.text)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if later := ask(t, start(t, c), r); later.usage.Cached != again.usage.Cached || later.text != first.text {
		t.Errorf("after a restart: %+v %q", later.usage, later.text)
	}
	c.Digest = "another model"
	if other := ask(t, start(t, c), r); other.usage.Cached != 0 {
		t.Errorf("another model uses %d tokens of it", other.usage.Cached)
	}
}

// With room for one and a half texts, three are all answered.
func TestTextsThatDoNotFitTogetherAreAllAnswered(t *testing.T) {
	e := start(t, engine.Config{Window: 192, CacheBytes: 1})
	var wg sync.WaitGroup
	for _, p := range []string{"Tell a story about a reef.", "Tell a story about a boat.", "Tell a story about a wave."} {
		prompt := question(t, p)
		wg.Go(func() {
			if got := ask(t, e, engine.Request{Prompt: prompt, Limit: 100, Likely: -1, Endless: true}); got.usage.Answer != 100 {
				t.Errorf("%d tokens", got.usage.Answer)
			}
		})
	}
	wg.Wait()
	if s := e.Stats(); s.PutBack == 0 || s.Running != 0 {
		t.Errorf("%+v", s)
	}
}

// conformance: L1
func TestAnAnswerHasTheFormThatWasAskedFor(t *testing.T) {
	e := start(t, engine.Config{})
	for seed := range uint64(3) {
		g, err := grammar.Schema(json.RawMessage(`{"type":"object","properties":{"city":{"type":"string","maxLength":20},"inhabitants":{"type":"integer"},"coastal":{"type":"boolean"}},
			"required":["city","inhabitants","coastal"],"additionalProperties":false}`), true)
		if err != nil {
			t.Fatal(err)
		}
		got := ask(t, e, engine.Request{Prompt: question(t, "Describe Lisbon as JSON."), Limit: 100, Likely: -1, Form: g,
			Sampling: engine.Sampling{Temperature: 1, Seed: seed}})
		var v struct {
			City        *string
			Inhabitants *int64
			Coastal     *bool
		}
		if err := json.Unmarshal([]byte(got.text), &v); err != nil || v.City == nil || v.Inhabitants == nil || v.Coastal == nil || got.finish != engine.FinishStop {
			t.Errorf("%q (%s): %v", got.text, got.finish, err)
		}
	}
}

func TestStopStringsAndLimitsEndAnAnswer(t *testing.T) {
	e := start(t, engine.Config{})
	prompt := tokensOf(t, "1, 2, 3, 4, 5,")
	got := ask(t, e, engine.Request{Prompt: prompt, Limit: 30, Stop: []string{", 9"}, Likely: 2})
	if !strings.HasSuffix(got.text, "8") || strings.Contains(got.text, "9") || got.finish != engine.FinishStop {
		t.Errorf("%q, %s", got.text, got.finish)
	}
	for _, tok := range got.tokens {
		if len(tok.Likely) != 2 || tok.Likely[0].LogProb != tok.LogProb || tok.LogProb > 0 {
			t.Errorf("%+v", tok)
		}
	}
	if got := ask(t, e, engine.Request{Prompt: prompt, Limit: 3, Likely: -1}); got.finish != engine.FinishLength || got.usage.Answer != 3 {
		t.Errorf("%+v", got)
	}
}

func TestACanceledRequestMakesRoom(t *testing.T) {
	e := start(t, engine.Config{Sequences: 1, Queue: 2})
	ctx, cancel := context.WithCancel(t.Context())
	s, err := e.Submit(ctx, engine.Request{Prompt: question(t, "Tell a long story."), Endless: true, Likely: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Next(ctx); err != nil {
		t.Fatal(err)
	}
	waiting, err := e.Submit(t.Context(), engine.Request{Prompt: question(t, "Hi."), Limit: 1, Likely: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Submit(t.Context(), engine.Request{Prompt: question(t, "Hi."), Limit: 1, Likely: -1}); !sandbox.Is(err, sandbox.Exhausted) {
		t.Errorf("one more than the queue holds: %v", err)
	}
	cancel()
	for err == nil {
		_, err = s.Next(t.Context())
	}
	if !sandbox.Is(err, sandbox.Canceled) {
		t.Errorf("the canceled one says %v", err)
	}
	if p, err := waiting.Next(t.Context()); err != nil || p.Finish == "" {
		t.Errorf("the waiting one: %+v, %v", p, err)
	}
}

func TestEmbeddingsOfAlikeTextsAreAlike(t *testing.T) {
	e := start(t, engine.Config{Batch: 8})
	embed := func(text string) []float32 {
		v, err := e.Embed(t.Context(), "", tokensOf(t, text))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	dot := func(a, b []float32) (sum float32) {
		for i := range a {
			sum += a[i] * b[i]
		}
		return sum
	}
	cat, kitten, tax := embed("The cat sleeps on the warm sofa."), embed("A kitten is sleeping on the couch."), embed("The parliament passed a new tax law in 1998.")
	if one := dot(cat, cat); one < 0.999 || one > 1.001 {
		t.Errorf("length %v", one)
	}
	if dot(cat, kitten) <= dot(cat, tax) {
		t.Errorf("a cat is nearer to a tax (%v) than to a kitten (%v)", dot(cat, tax), dot(cat, kitten))
	}
	if !slices.Equal(cat, embed("The cat sleeps on the warm sofa.")) {
		t.Error("the same text has two embeddings")
	}
}

// conformance: L5
func TestASmallModelGuessesWithoutChangingTheAnswer(t *testing.T) {
	alone := start(t, engine.Config{Sequences: 1})
	guessing := start(t, engine.Config{Draft: world.model}) // as good a guesser as can be
	var wg sync.WaitGroup
	var wants []answer
	prompts := []string{"What is the capital of France?", "Count from one to ten.", "Write a line about the sea."}
	for _, p := range prompts {
		wants = append(wants, ask(t, alone, engine.Request{Prompt: question(t, p), Limit: 40, Likely: -1}))
	}
	for i, p := range prompts {
		prompt, want := question(t, p), wants[i]
		wg.Go(func() {
			got := ask(t, guessing, engine.Request{Prompt: prompt, Limit: 40, Likely: -1})
			if got.text != want.text || got.finish != want.finish {
				t.Errorf("%q (%s), want %q (%s)", got.text, got.finish, want.text, want.finish)
			}
		})
	}
	wg.Wait()
	s := guessing.Stats()
	t.Logf("measured: L5 of %d tokens guessed ahead %d were right", s.Guessed, s.Right)
	if s.Right == 0 && s.Guessed > 8 {
		t.Errorf("of %d guesses %d were right", s.Guessed, s.Right)
	}
}

// conformance: L5
func TestChoicesForOnePromptShareIt(t *testing.T) {
	e := start(t, engine.Config{Batch: 64, Chunk: 64})
	prompt := question(t, strings.Repeat("The reef is a ring around the lagoon. ", 16)+"What is the reef?")
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			ask(t, e, engine.Request{Prompt: prompt, Limit: 4, Likely: -1, Sampling: engine.Sampling{Temperature: 1, Seed: uint64(i)}})
		})
	}
	wg.Wait()
	if s := e.Stats(); s.PassTokens > int64(len(prompt)+4*(32+32+4)) {
		t.Errorf("%d tokens were computed for four choices of a prompt of %d", s.PassTokens, len(prompt))
	}
}

// conformance: L5
func TestTextsGoToDiskAndComeBackWhileOthersRun(t *testing.T) {
	e := start(t, engine.Config{Window: 224, CacheBytes: 1, Digest: "d", KeepDir: t.TempDir()})
	first := engine.Request{Prompt: question(t, strings.Repeat("The reef is a ring. ", 20)+"What is it?"), Limit: 8, Likely: -1}
	want := ask(t, e, first)
	for _, p := range []string{"boat", "wave", "wind"} { // more than the memory holds
		ask(t, e, engine.Request{Prompt: question(t, strings.Repeat("A "+p+" comes by. ", 24)), Limit: 8, Likely: -1})
	}
	got := ask(t, e, first)
	if s := e.Stats().Cache; got.usage.Cached < 64 || got.text != want.text || s.Read < 2 || s.Written < 2 {
		t.Errorf("%+v %q, want %q; %+v", got.usage, got.text, want.text, s)
	}
}
