package model_test

import (
	"os"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// What was said far back is found again by choosing pages, where a window of as many tokens has lost it. `atoll bench attention`
// measures longer texts.
//
// conformance: L6
func TestSparseAttentionKnowsWhatAWindowHasLost(t *testing.T) {
	const file = "gemma-3-270m-q4_k_m.gguf"
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	m := openFile(t, file)
	o := model.LongTextOptions{Text: encode(t, file, string(text))[1:], BOS: 2, Length: 2048, Numbers: tensor.F16, Sparse: []tensor.Sparse{
		{}, {First: 64, Near: 768}, {First: 64, Near: 256, Pages: 16},
	}}
	for _, n := range [][2]string{{"Lisbon", " 48213"}, {"Osaka", " 93057"}, {"Quito", " 17264"}, {"Dakar", " 60935"}} {
		place, number := n[0], n[1]
		question := encode(t, file, "\n\nThe secret number of "+place+" is")[1:]
		whole := encode(t, file, "\n\nThe secret number of "+place+" is"+number)[1:]
		fact := encode(t, file, "\n\nThe secret number of "+place+" is"+number+".\n\n")[1:]
		o.Needles = append(o.Needles, model.Needle{Fact: fact, Question: question, Answer: whole[len(question):]})
	}
	list, _, err := m.LongText(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	full, window, sparse := list[0], list[1], list[2]
	t.Logf("measured: L6 at the end of 2048 tokens: full %v; window of 768 %v; 16 pages of 32 and 256 near %v", full, window, sparse)
	if sparse.Surprise >= window.Surprise || sparse.Perplexity > 1.1*full.Perplexity {
		t.Errorf("full %v\nwindow %v\nsparse %v", full, window, sparse)
	}
}

func TestAStretchedModelReadsLongerTexts(t *testing.T) {
	path := modeltest.Path(t, "smollm2-135m-instruct-q4_1.gguf")
	r, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	plain, err := model.FromGGUF(r.File)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"linear:4", "yarn:4"} {
		s, err := model.ParseStretch(kind)
		if err != nil || s.String() != kind {
			t.Fatalf("%v, %v", s, err)
		}
		f := *r.File
		f.Meta = r.Meta.Clone()
		if err := s.Apply(&f); err != nil {
			t.Fatal(err)
		}
		c, err := model.FromGGUF(&f)
		if err != nil {
			t.Fatal(err)
		}
		last := len(c.Rope.Freq) - 1
		if c.Context != 4*plain.Context || c.Rope.Freq[last] != plain.Rope.Freq[last]/4 || kind == "yarn:4" && c.Rope.Freq[0] != plain.Rope.Freq[0] {
			t.Errorf("%s: %d tokens, frequencies from %v to %v", kind, c.Context, c.Rope.Freq[0], c.Rope.Freq[last])
		}
		if err := s.Apply(&f); !sandbox.Is(err, sandbox.Unsupported) {
			t.Errorf("stretched twice: %v", err)
		}
	}
	for _, bad := range []string{"yarn", "yarn:0", "linear:NaN", "linear:1", "cubic:2", "yarn:1e9", ":"} {
		if _, err := model.ParseStretch(bad); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
