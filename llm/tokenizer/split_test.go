package tokenizer

import (
	"encoding/json"
	"os"
	"slices"
	"testing"
)

func wordsOf(t *testing.T, name, text string) []string {
	t.Helper()
	s, err := splitters(name)
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	cut(s, text, func(w string) { words = append(words, w) })
	return words
}

func TestTekkenCutsAsTheReference(t *testing.T) {
	var ref struct {
		Texts  []string   `json:"texts"`
		Tekken [][]string `json:"tekken"`
	}
	b, err := os.ReadFile("testdata/reference.json")
	if err == nil {
		err = json.Unmarshal(b, &ref)
	}
	if err != nil {
		t.Fatal(err)
	}
	for i, text := range ref.Texts {
		if got := wordsOf(t, "tekken", text); !slices.Equal(got, ref.Tekken[i]) {
			t.Errorf("%q:\n got %q\nwant %q", text, got, ref.Tekken[i])
		}
	}
}

// FuzzSplit: every text is cut, into words that are not empty and make up the text.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{"I'm 12 x\n\n y", " \t\r\n", "Aa中\u0301 /\n", "\xff\xfe '", "'\u017f"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, name := range []string{"gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"} {
			all := ""
			for _, w := range wordsOf(t, name, text) {
				if w == "" {
					t.Fatal("an empty word")
				}
				all += w
			}
			if all != text {
				t.Fatalf("%s cut %q into what is %q", name, text, all)
			}
		}
	})
}
