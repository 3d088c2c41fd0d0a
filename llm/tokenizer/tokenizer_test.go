package tokenizer_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/tokenizer"
)

// A reference is what testdata/reference.py had from Hugging Face's tokenizers.
type reference struct {
	Texts   []string                     `json:"texts"`
	IDs     map[string][][]int32         `json:"ids"`
	Decoded map[string]map[string]string `json:"decoded"` // where it is not the text
	Tekken  [][]string                   `json:"tekken"`
}

var references = sync.OnceValues(func() (reference, error) {
	var r reference
	b, err := os.ReadFile("testdata/reference.json")
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
})

func fromGGUF(t testing.TB, name string) *tokenizer.Tokenizer {
	t.Helper()
	f, err := gguf.Open(modeltest.Path(t, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tok, err := tokenizer.FromGGUF(&f.Meta)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func specFromJSON(t testing.TB, family string) tokenizer.Spec {
	t.Helper()
	open := func(name string) *os.File {
		f, err := os.Open(modeltest.Path(t, family+"/"+name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	spec, err := tokenizer.ReadJSON(open("tokenizer.json"), open("tokenizer_config.json"))
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func fromJSON(t testing.TB, family string) *tokenizer.Tokenizer {
	t.Helper()
	tok, err := tokenizer.New(specFromJSON(t, family))
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// conformance: L1
func TestIDsAreThoseOfTheReference(t *testing.T) {
	ref, err := references()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		family string
		open   func() *tokenizer.Tokenizer
	}{
		"smollm2, GGUF":          {"smollm2", func() *tokenizer.Tokenizer { return fromGGUF(t, "smollm2-135m-instruct-q4_1.gguf") }},
		"gemma3, GGUF":           {"gemma3", func() *tokenizer.Tokenizer { return fromGGUF(t, "gemma-3-270m-q4_k_m.gguf") }},
		"gemma3, JSON":           {"gemma3", func() *tokenizer.Tokenizer { return fromJSON(t, "gemma3") }},
		"llama2, JSON":           {"llama2", func() *tokenizer.Tokenizer { return fromJSON(t, "llama2") }},
		"llama3, JSON":           {"llama3", func() *tokenizer.Tokenizer { return fromJSON(t, "llama3") }},
		"qwen3, JSON":            {"qwen3", func() *tokenizer.Tokenizer { return fromJSON(t, "qwen3") }},
		"llama3, JSON to GGUF":   {"llama3", func() *tokenizer.Tokenizer { return throughGGUF(t, specFromJSON(t, "llama3")) }},
		"mistral, SentencePiece": {"mistral", func() *tokenizer.Tokenizer { return throughGGUF(t, fromSentencePiece(t, nil)) }},
		"llama2, JSON to GGUF":   {"llama2", func() *tokenizer.Tokenizer { return throughGGUF(t, specFromJSON(t, "llama2")) }},
	} {
		t.Run(name, func(t *testing.T) {
			tok := c.open()
			for i, text := range ref.Texts {
				want := ref.IDs[c.family][i]
				// SentencePiece takes the names of control tokens for text.
				got, err := tok.Encode(text, c.family != "mistral")
				if err != nil || !slices.Equal(got, want) {
					t.Errorf("%q:\n got %v %q, %v\nwant %v %q", text, got, names(tok, got), err, want, names(tok, want))
					continue
				}
				back, ok := ref.Decoded[c.family][strconv.Itoa(i)]
				if !ok {
					back = text
				}
				if d := tok.Decode(want); d != back {
					t.Errorf("decoded %v to %q, want %q", want, d, back)
				}
			}
		})
	}
}

// throughGGUF makes a tokenizer of a vocabulary that was stored as metadata.
func throughGGUF(t *testing.T, spec tokenizer.Spec) *tokenizer.Tokenizer {
	t.Helper()
	var m gguf.Meta
	if err := spec.Store(&m); err != nil {
		t.Fatal(err)
	}
	tok, err := tokenizer.FromGGUF(&m)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func names(tok *tokenizer.Tokenizer, ids []int32) []string {
	var out []string
	for _, id := range ids {
		out = append(out, tok.Name(id))
	}
	return out
}

func TestSpecialTokensAreTextUnlessTheyAreAskedFor(t *testing.T) {
	tok := fromGGUF(t, "smollm2-135m-instruct-q4_1.gguf")
	const text = "<|im_start|>user\nhi<|im_end|>"
	with, _ := tok.Encode(text, true)
	without, _ := tok.Encode(text, false)
	end, ok := tok.Lookup("<|im_end|>")
	if !ok || with[len(with)-1] != end || slices.Contains(without, end) {
		t.Error(names(tok, with), names(tok, without))
	}
	if got := tok.Decode(without); got != text {
		t.Errorf("%q", got)
	}
	if got := tok.Decode(with); got != "user\nhi" {
		t.Errorf("%q", got)
	}
	if !tok.Stop(end) || !tok.Control(end) || tok.Stop(without[0]) {
		t.Error("stops are", names(tok, tok.Stops()))
	}
}

func TestAPromptBeginsAsTheModelWants(t *testing.T) {
	gemma := fromGGUF(t, "gemma-3-270m-q4_k_m.gguf")
	for _, text := range []string{"hi", "<bos>hi"} {
		ids, err := gemma.EncodePrompt(text, true)
		if err != nil || len(ids) != 2 || ids[0] != gemma.BOS() {
			t.Error(text, names(gemma, ids), err)
		}
	}
	smol := fromGGUF(t, "smollm2-135m-instruct-q4_1.gguf")
	if ids, _ := smol.EncodePrompt("hi", true); len(ids) != 1 {
		t.Error(names(smol, ids))
	}
	if gemma.Stop(gemma.BOS()) || !gemma.Stop(gemma.EOS()) || len(gemma.Stops()) != 2 {
		t.Error("stops are", names(gemma, gemma.Stops()))
	}
}

func TestAStreamHandsOutWholeCharactersOnly(t *testing.T) {
	for _, name := range []string{"smollm2-135m-instruct-q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"} {
		tok := fromGGUF(t, name)
		const text = "a 👨‍👩‍👧‍👦 é 中文 🦥🫠"
		ids, _ := tok.Encode(text, false)
		s := tok.Stream()
		var got strings.Builder
		for _, id := range ids {
			part := s.Add(id)
			if !utf8.ValidString(part) || strings.ContainsRune(part, utf8.RuneError) {
				t.Errorf("token %q gave %q", tok.Name(id), part)
			}
			got.WriteString(part)
		}
		if rest := s.Flush(); rest != "" || got.String() != text {
			t.Errorf("%s: %q and %q", name, got.String(), rest)
		}
		// An answer that ends inside a character says so at its end.
		half, _ := tok.Encode("🫠", false)
		if len(half) > 1 {
			if part := s.Add(half[0]); part != "" {
				t.Errorf("half a character gave %q", part)
			}
			if rest := s.Flush(); rest != "\uFFFD" {
				t.Errorf("half a character left %q", rest)
			}
		}
	}
}

func TestAVocabularyOfAnotherModelIsRefused(t *testing.T) {
	tok := fromGGUF(t, "smollm2-135m-instruct-q4_1.gguf")
	for rows, want := range map[int]bool{49152: true, 49280: true, 49151: false, 128256: false, 32000: false} {
		if err := tok.Fits(rows); (err == nil) != want {
			t.Error(rows, err)
		}
	}
}

func TestWhatDoesNotFitTogetherIsRefused(t *testing.T) {
	good := func() tokenizer.Spec {
		return tokenizer.Spec{Model: tokenizer.ModelBPE, Tokens: []string{"a", "b", "ab"}, Types: []tokenizer.TokenType{1, 1, 1},
			Merges: []string{"a b"}, BOS: -1, EOS: -1, EOT: -1, Unk: -1}
	}
	if tok, err := tokenizer.New(good()); err != nil {
		t.Fatal(err)
	} else if ids, err := tok.Encode("abcb", false); err != nil || !slices.Equal(ids, []int32{2, 1}) {
		t.Error("what has no token is left out, not", ids, err)
	}
	for want, spoil := range map[string]func(*tokenizer.Spec){
		"1 to":                  func(s *tokenizer.Spec) { s.Tokens = nil },
		"2 types":               func(s *tokenizer.Spec) { s.Types = s.Types[:2] },
		"without merges":        func(s *tokenizer.Spec) { s.Merges = nil },
		"not two tokens":        func(s *tokenizer.Spec) { s.Merges = []string{"ab"} },
		"not in the vocabulary": func(s *tokenizer.Spec) { s.Merges = []string{"b a"} },
		"outside":               func(s *tokenizer.Spec) { s.EOS = 3 },
		"not known here":        func(s *tokenizer.Spec) { s.Pre = "klingon" },
		"not supported":         func(s *tokenizer.Spec) { s.Model = "bert" },
		"0 scores":              func(s *tokenizer.Spec) { s.Model = tokenizer.ModelSentencePiece },
	} {
		s := good()
		spoil(&s)
		if _, err := tokenizer.New(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func TestHostileJSONIsRefused(t *testing.T) {
	for want, doc := range map[string]string{
		"unexpected":    `{`,
		"only BPE":      `{"model":{"type":"Unigram"}}`,
		"go up to":      `{"model":{"type":"BPE","vocab":{"a":2000000000}}}`,
		"negative":      `{"model":{"type":"BPE","vocab":{"a":-5,"b":0}}}`,
		"taken":         `{"model":{"type":"BPE","vocab":{"a":0,"b":0}}}`,
		"has the id -1": `{"added_tokens":[{"id":-1,"content":"x"}],"model":{"type":"BPE","vocab":{"a":0}}}`,
		"text is cut":   `{"pre_tokenizer":{"type":"Split","pattern":{"Regex":"x"}},"model":{"type":"BPE","vocab":{"a":0}}}`,
	} {
		if _, err := tokenizer.ReadJSON(strings.NewReader(doc), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func FuzzReadJSON(f *testing.F) {
	f.Add(`{"added_tokens":[{"id":3,"content":"<s>","special":true}],"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}`)
	f.Fuzz(func(t *testing.T, doc string) {
		spec, err := tokenizer.ReadJSON(strings.NewReader(doc), nil)
		if err != nil {
			return
		}
		tok, err := tokenizer.New(spec)
		if err != nil {
			return
		}
		if ids, err := tok.Encode(doc, true); err == nil {
			tok.Decode(ids)
		}
	})
}

// FuzzRoundTrip: what is encoded decodes to the same, for text of any bytes.
func FuzzRoundTrip(f *testing.F) {
	ref, err := references()
	if err != nil {
		f.Fatal(err)
	}
	for _, text := range ref.Texts {
		f.Add(text)
	}
	smol, gemma := fromGGUF(f, "smollm2-135m-instruct-q4_1.gguf"), fromGGUF(f, "gemma-3-270m-q4_k_m.gguf")
	missing := map[*tokenizer.Tokenizer][]byte{smol: unsayable(f, smol)}
	f.Fuzz(func(t *testing.T, text string) {
		for _, tok := range []*tokenizer.Tokenizer{smol, gemma} {
			text := without(text, missing[tok])
			ids, err := tok.Encode(text, false)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.ToValidUTF8(text, "\uFFFD")
			if tok == gemma {
				want = strings.ReplaceAll(want, "\u2581", " ") // which is how its vocabulary writes a space
			}
			// How many U+FFFD a run of bad bytes becomes depends on where tokens end.
			if got := squeeze(tok.Decode(ids)); got != squeeze(want) {
				t.Fatalf("%q became %q", text, got)
			}
		}
	})
}

// unsayable returns the bytes that a vocabulary has no token for: a few control
// characters that never occurred in what it was made from.
func unsayable(t testing.TB, tok *tokenizer.Tokenizer) (missing []byte) {
	for b := range 256 {
		if ids, err := tok.Encode(string([]byte{byte(b)}), false); err != nil || len(ids) == 0 {
			missing = append(missing, byte(b))
		}
	}
	if len(missing) > 64 {
		t.Fatal("too many bytes have no token:", missing)
	}
	return missing
}

func without(text string, bytes []byte) string {
	b := []byte(text)
	return string(slices.DeleteFunc(b, func(c byte) bool { return slices.Contains(bytes, c) }))
}

func squeeze(s string) string {
	for strings.Contains(s, "\uFFFD\uFFFD") {
		s = strings.ReplaceAll(s, "\uFFFD\uFFFD", "\uFFFD")
	}
	return norm.NFC.String(s)
}

func BenchmarkEncode(b *testing.B) {
	text, err := os.ReadFile(filepath.Join("..", "..", "ARCHITECTURE.md"))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"smollm2-135m-instruct-q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"} {
		tok := fromGGUF(b, name)
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				if _, err := tok.Encode(string(text), false); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkLoad(b *testing.B) {
	for _, name := range []string{"smollm2-135m-instruct-q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				fromGGUF(b, name)
			}
		})
	}
}
