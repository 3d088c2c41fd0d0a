// Package tokenizer turns text into the token ids that a language model was
// trained on, and back.
//
// Two algorithms cover the families that the engine serves: byte-level BPE, where
// text is first cut into words (GPT-2, Llama 3, Qwen, SmolLM, Mistral Nemo), and
// SentencePiece's BPE, which merges by score over whole text (Llama 2, Mistral,
// Gemma). Both merge neighbours in the order of a rank; they differ in what they start
// from and in how a merge is looked up.
package tokenizer

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// A Tokenizer encodes and decodes for one vocabulary. It does not change after
// New and can be used from several goroutines.
type Tokenizer struct {
	spec    Spec
	bytes   []string // what each token stands for, in bytes; empty for control tokens
	control []bool   // tokens that are not text
	ids     map[string]int32
	merger  merger
	words   []splitter // cut text one after the other; empty means that text is not cut
	special matcher    // tokens found in text as a whole before anything else: control ones
	user    matcher    // and those that are text all the same
	stops   []int32
}

// MaxText is how much text Encode takes, in bytes. What is longer does not fit
// any model's window.
const MaxText = 64 << 20

// Encode returns the tokens of text, without those that begin or end a sequence.
// With special, the names of control tokens in the text mean these tokens, as in a
// prompt made from a chat template; otherwise they are text like any other. It
// fails when text is longer than MaxText.
func (t *Tokenizer) Encode(text string, special bool) ([]int32, error) {
	if len(text) > MaxText {
		return nil, fmt.Errorf("%d bytes of text are more than the %d that can be encoded at once", len(text), MaxText)
	}
	var out []int32
	if t.spec.Model == ModelSentencePiece {
		text = strings.ReplaceAll(text, space, " ") // two ways of writing the same
	}
	match := &t.user
	if special {
		match = &t.special
	}
	for len(text) > 0 {
		from, to, id := match.find(text)
		if from > 0 {
			out = t.plain(out, text[:from])
		}
		if id >= 0 {
			out = append(out, id)
		}
		text = text[to:]
	}
	return out, nil
}

// plain appends the tokens of text in which no token stands as a whole.
func (t *Tokenizer) plain(out []int32, text string) []int32 {
	if t.spec.NFC {
		text = norm.NFC.String(text)
	}
	if t.spec.Model == ModelSentencePiece {
		text = strings.ReplaceAll(text, " ", space)
		if t.spec.SpacePrefix {
			text = space + text
		}
	}
	cut(t.words, text, func(word string) {
		if t.spec.WholeWords {
			if id, ok := t.ids[word]; ok {
				out = append(out, id)
				return
			}
		}
		out = t.merger.merge(out, word)
	})
	return out
}

// EncodePrompt returns the tokens of a whole sequence: Encode between the tokens
// that begin and end one, where the model wants these. A prompt that brings its
// own beginning does not get a second one.
func (t *Tokenizer) EncodePrompt(text string, special bool) ([]int32, error) {
	ids, err := t.Encode(text, special)
	if err != nil {
		return nil, err
	}
	s := &t.spec
	if s.AddBOS && s.BOS >= 0 && (len(ids) == 0 || ids[0] != s.BOS) {
		ids = append([]int32{s.BOS}, ids...)
	}
	if s.AddEOS && s.EOS >= 0 {
		ids = append(ids, s.EOS)
	}
	return ids, nil
}

// Decode returns the text of tokens that begin a sequence; control tokens are left
// out. Bytes that are not UTF-8 become U+FFFD. Ids outside of the vocabulary are
// left out too.
func (t *Tokenizer) Decode(ids []int32) string {
	var b strings.Builder
	d := t.Stream()
	for _, id := range ids {
		b.WriteString(d.Add(id))
	}
	b.WriteString(d.Flush())
	if t.spec.Model == ModelSentencePiece && t.spec.SpacePrefix {
		return strings.TrimPrefix(b.String(), " ")
	}
	return b.String()
}

// Stream returns a decoder of tokens that come one by one.
func (t *Tokenizer) Stream() *Stream { return &Stream{t: t} }

// A Stream decodes tokens one by one and hands out whole characters only. It must
// not be used from several goroutines at a time.
type Stream struct {
	t    *Tokenizer
	held []byte // the beginning of a character, at most 3 bytes
}

// Add returns the text that is complete with this token; it may be empty.
func (s *Stream) Add(id int32) string {
	s.held = append(s.held, s.t.Bytes(id)...)
	end := len(s.held)
	// An unfinished character is at most three bytes long.
	for i := max(0, end-utf8.UTFMax+1); i < end; i++ {
		if utf8.RuneStart(s.held[i]) && !utf8.FullRune(s.held[i:]) {
			end = i
			break
		}
	}
	text := strings.ToValidUTF8(string(s.held[:end]), "\uFFFD")
	s.held = append(s.held[:0], s.held[end:]...)
	return text
}

// Flush returns what is left: U+FFFD for a character that was never finished.
func (s *Stream) Flush() string {
	text := strings.ToValidUTF8(string(s.held), "\uFFFD")
	s.held = s.held[:0]
	return text
}

// Bytes returns the bytes that a token stands for, which need not be whole
// characters; empty for control tokens and for ids outside of the vocabulary.
func (t *Tokenizer) Bytes(id int32) string {
	if id < 0 || int(id) >= len(t.bytes) {
		return ""
	}
	return t.bytes[id]
}

// Name returns a token as the vocabulary writes it, e.g. "<|im_end|>"; empty for ids
// outside of the vocabulary.
func (t *Tokenizer) Name(id int32) string {
	if id < 0 || int(id) >= len(t.spec.Tokens) {
		return ""
	}
	return t.spec.Tokens[id]
}

// Lookup returns the id of a token as the vocabulary writes it.
func (t *Tokenizer) Lookup(name string) (int32, bool) {
	for i, s := range t.spec.Tokens {
		if s == name {
			return int32(i), true
		}
	}
	return -1, false
}

// Len returns the size of the vocabulary.
func (t *Tokenizer) Len() int { return len(t.spec.Tokens) }

// Control reports whether a token is not text.
func (t *Tokenizer) Control(id int32) bool {
	return id >= 0 && int(id) < len(t.control) && t.control[id]
}

// BOS returns the token that begins a sequence, -1 if there is none.
func (t *Tokenizer) BOS() int32 { return t.spec.BOS }

// EOS returns the token that ends a sequence, -1 if there is none.
func (t *Tokenizer) EOS() int32 { return t.spec.EOS }

// Stops returns the tokens with which a model ends its answer: EOS, and those that
// end a turn or a message. The result is shared.
func (t *Tokenizer) Stops() []int32 { return t.stops }

// Stop reports whether a token is one of Stops.
func (t *Tokenizer) Stop(id int32) bool {
	for _, s := range t.stops {
		if s == id {
			return true
		}
	}
	return false
}

// Same tells whether both have the same tokens by the same numbers.
func (t *Tokenizer) Same(o *Tokenizer) bool {
	return slices.Equal(t.spec.Tokens, o.spec.Tokens) && slices.Equal(t.stops, o.stops)
}

// Fits returns an error unless a model with an embedding of so many rows can be
// used with this vocabulary. Models may have more rows than tokens, since rows are
// padded to round numbers; the reverse is a tokenizer of another model.
func (t *Tokenizer) Fits(rows int) error {
	const padding = 1024 // the largest seen is 512
	if t.Len() > rows || t.Len() < rows-rows/8-padding {
		return fmt.Errorf("the tokenizer has %d tokens and the model %d: they do not belong together", t.Len(), rows)
	}
	return nil
}
