package tokenizer

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// The algorithms, by their names in GGUF files.
const (
	ModelBPE           = "gpt2"
	ModelSentencePiece = "llama"
)

// A TokenType says what a token is for; its values are those of GGUF files.
type TokenType int32

// The types of tokens.
const (
	Normal  TokenType = 1
	Unknown TokenType = 2 // stands for what cannot be expressed
	Control TokenType = 3 // not text: begins, ends, separates
	User    TokenType = 4 // text that is always one token
	Unused  TokenType = 5
	Byte    TokenType = 6 // a byte, written <0x0A>
)

// A Spec is what a tokenizer is made of, whichever file it comes from.
type Spec struct {
	Model  string // ModelBPE or ModelSentencePiece
	Pre    string // how text is cut into words, by its name in GGUF files; ModelBPE only
	Tokens []string
	Types  []TokenType // one a token
	Scores []float32   // one a token; the higher is merged first; ModelSentencePiece only
	Merges []string    // pairs of tokens with a space between, first ones first; ModelBPE only

	BOS, EOS, EOT, Unk int32 // -1: none. EOT ends a turn
	AddBOS, AddEOS     bool
	SpacePrefix        bool // text begins with a space, if need be one that was added
	WholeWords         bool // a word that is a token is that token, whatever the merges say
	NFC                bool // text is normalised before it is encoded
}

// maxTokens bounds a vocabulary; the largest in use has 262144.
const maxTokens = 1 << 22

// space is how SentencePiece writes a space.
const space = "\u2581"

// endings are the names of tokens that end a turn or a message, in the families
// that are known.
var endings = []string{"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>",
	"<end_of_turn>", "<EOT>", "<|EOT|>", "</s>", "<eos>"}

// New makes a tokenizer. Errors are Invalid when the parts do not fit together and
// Unsupported when the vocabulary needs what is not known here.
func New(spec Spec) (*Tokenizer, error) {
	const op = "tokenizer.New"
	if err := spec.check(); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	t := &Tokenizer{
		spec:    spec,
		bytes:   make([]string, len(spec.Tokens)),
		control: make([]bool, len(spec.Tokens)),
	}
	if spec.Model == ModelBPE {
		words, err := splitters(spec.Pre)
		if err != nil {
			return nil, sandbox.E(op, sandbox.Unsupported, "", err)
		}
		t.words = words
	} else if !joinsWords(&spec) {
		t.words = []splitter{splitSpaces}
	}
	t.ids = make(map[string]int32, len(spec.Tokens))
	for i, name := range spec.Tokens {
		t.add(int32(i), name, spec.Types[i])
	}
	var err error
	if t.merger, err = newMerger(&spec, t.ids, t.bytes); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	// An id that ends answers stands there once.
	t.stops = []int32{}
	for _, id := range []int32{spec.EOS, spec.EOT} {
		if id >= 0 && !slices.Contains(t.stops, id) {
			t.stops = append(t.stops, id)
		}
	}
	for i, name := range spec.Tokens {
		if t.control[i] && slices.Contains(endings, name) && !slices.Contains(t.stops, int32(i)) {
			t.stops = append(t.stops, int32(i))
		}
	}
	return t, nil
}

// add files a token under what it is.
func (t *Tokenizer) add(id int32, name string, typ TokenType) {
	text := name
	switch {
	case typ == Byte:
		if b, ok := byteOf(name); ok {
			text = string([]byte{b})
		}
	case typ == User:
		// It is written as the text that it is.
	case typ != Normal:
		t.control[id] = true
	case t.spec.Model == ModelBPE:
		text = unmap(name)
	default:
		text = strings.ReplaceAll(name, space, " ")
	}
	if !t.control[id] {
		t.bytes[id] = text
	}
	switch typ {
	case Control:
		t.special.add(name, id)
	case User:
		t.special.add(name, id)
		t.user.add(name, id)
	case Normal:
		key := text
		if t.spec.Model == ModelSentencePiece {
			key = name
		}
		if _, taken := t.ids[key]; !taken {
			t.ids[key] = id
		}
	}
}

// joinsWords reports whether any token goes on after the end of a word, so that text
// cannot be cut at spaces without changing what becomes of it.
func joinsWords(spec *Spec) bool {
	for i, name := range spec.Tokens {
		if spec.Types[i] == Normal && splitSpaces(name) < len(name) {
			return true
		}
	}
	return false
}

// byteOf reads the name of a byte token, e.g. <0x0A>.
func byteOf(name string) (byte, bool) {
	if len(name) != 6 || name[:3] != "<0x" || name[5] != '>' {
		return 0, false
	}
	b, err := strconv.ParseUint(name[3:5], 16, 8)
	return byte(b), err == nil
}

func (s *Spec) check() error {
	n := len(s.Tokens)
	if n == 0 || n > maxTokens {
		return fmt.Errorf("a vocabulary has 1 to %d tokens, not %d", maxTokens, n)
	}
	if len(s.Types) != n {
		return fmt.Errorf("%d tokens and %d types", n, len(s.Types))
	}
	switch s.Model {
	case ModelBPE:
		if len(s.Merges) == 0 {
			return errors.New("a BPE vocabulary without merges")
		}
	case ModelSentencePiece:
		if len(s.Scores) != n {
			return fmt.Errorf("%d tokens and %d scores", n, len(s.Scores))
		}
	default:
		return fmt.Errorf("tokenizer model %q is not supported, only %q and %q", s.Model, ModelBPE, ModelSentencePiece)
	}
	for what, id := range map[string]int32{"begins a sequence": s.BOS, "ends a sequence": s.EOS, "ends a turn": s.EOT, "stands for the unknown": s.Unk} {
		if id < -1 || int(id) >= n {
			return fmt.Errorf("the token that %s is %d, outside of the vocabulary of %d", what, id, n)
		}
	}
	return nil
}
