package tokenizer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// maxJSON bounds a tokenizer.json, in bytes; the largest in use has 33 MB.
const maxJSON = 256 << 20

// A huggingFace is what counts of a tokenizer.json.
type huggingFace struct {
	Added []struct {
		ID      int32  `json:"id"`
		Content string `json:"content"`
		Special bool   `json:"special"`
	} `json:"added_tokens"`
	Normalizer    stage `json:"normalizer"`
	PreTokenizer  stage `json:"pre_tokenizer"`
	PostProcessor stage `json:"post_processor"`
	Model         struct {
		Type         string           `json:"type"`
		Unk          string           `json:"unk_token"`
		ByteFallback bool             `json:"byte_fallback"`
		IgnoreMerges bool             `json:"ignore_merges"`
		Vocab        map[string]int32 `json:"vocab"`
		Merges       []mergePair      `json:"merges"`
	} `json:"model"`
}

// A stage is a normaliser, pre-tokenizer or post-processor, or a sequence of such.
type stage struct {
	Type           string  `json:"type"`
	Normalizers    []stage `json:"normalizers"`
	PreTokenizers  []stage `json:"pretokenizers"`
	Processors     []stage `json:"processors"`
	Individual     bool    `json:"individual_digits"`
	AddPrefixSpace bool    `json:"add_prefix_space"`
	UseRegex       *bool   `json:"use_regex"`
	PrependScheme  string  `json:"prepend_scheme"`
	Pattern        struct {
		Regex  string `json:"Regex"`
		String string `json:"String"`
	} `json:"pattern"`
	Single []struct {
		Special *struct {
			ID string `json:"id"`
		} `json:"SpecialToken"`
		Sequence *struct{} `json:"Sequence"`
	} `json:"single"`
}

// A mergePair is written as "a b" or as ["a", "b"].
type mergePair string

func (p *mergePair) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		*p = mergePair(s)
		return nil
	}
	var pair [2]string
	if err := json.Unmarshal(b, &pair); err != nil {
		return err
	}
	*p = mergePair(pair[0] + " " + pair[1])
	return nil
}

// A config is what counts of a tokenizer_config.json.
type config struct {
	AddBOS *bool                 `json:"add_bos_token"`
	AddEOS bool                  `json:"add_eos_token"`
	BOS    tokenName             `json:"bos_token"`
	EOS    tokenName             `json:"eos_token"`
	Added  map[string]addedToken `json:"added_tokens_decoder"` // by id; tokenizer.json has them too
}

// An addedToken is one that was added to a vocabulary after it was made.
type addedToken struct {
	Content string `json:"content"`
	Special bool   `json:"special"`
}

// A tokenName is written as a string or as an object with its content.
type tokenName string

func (n *tokenName) UnmarshalJSON(b []byte) error {
	var s *string
	if json.Unmarshal(b, &s) == nil {
		if s != nil {
			*n = tokenName(*s)
		}
		return nil
	}
	var o struct {
		Content string `json:"content"`
	}
	err := json.Unmarshal(b, &o)
	*n = tokenName(o.Content)
	return err
}

// ReadJSON reads a vocabulary from a tokenizer.json and, unless it is nil, the
// tokenizer_config.json beside it. Errors are Invalid and Unsupported.
func ReadJSON(tokenizer, conf io.Reader) (Spec, error) {
	const op = "tokenizer.ReadJSON"
	var h huggingFace
	var c config
	if err := json.NewDecoder(io.LimitReader(tokenizer, maxJSON)).Decode(&h); err != nil {
		return Spec{}, sandbox.E(op, sandbox.Invalid, "tokenizer.json", err)
	}
	if conf != nil {
		if err := json.NewDecoder(io.LimitReader(conf, maxJSON)).Decode(&c); err != nil {
			return Spec{}, sandbox.E(op, sandbox.Invalid, "tokenizer_config.json", err)
		}
	}
	s, err := h.spec(&c)
	if err != nil {
		kind := sandbox.Invalid
		if errors.Is(err, errors.ErrUnsupported) {
			kind = sandbox.Unsupported
		}
		return s, sandbox.E(op, kind, "tokenizer.json", err)
	}
	return s, nil
}

func (h *huggingFace) spec(c *config) (Spec, error) {
	if h.Model.Type != "BPE" {
		return Spec{}, fmt.Errorf("%w: tokenizer model %q, only BPE is known", errors.ErrUnsupported, h.Model.Type)
	}
	s := Spec{Model: ModelBPE}
	if h.Model.ByteFallback {
		s.Model = ModelSentencePiece
	}
	if err := h.tokens(&s); err != nil {
		return s, err
	}
	var err error
	if s.Model == ModelBPE {
		if s.Pre, err = h.PreTokenizer.name(); err != nil {
			return s, err
		}
	}
	s.defaults()
	s.AddBOS, s.AddEOS = c.AddBOS != nil && *c.AddBOS, c.AddEOS
	s.SpacePrefix = h.Normalizer.prepends() || h.PreTokenizer.prepends()
	s.WholeWords = h.Model.IgnoreMerges
	s.NFC = h.Normalizer.has("NFC")
	ids := make(map[string]int32, len(s.Tokens))
	for i, name := range s.Tokens {
		ids[name] = int32(i)
	}
	for _, p := range []struct {
		id   *int32
		name string
	}{{&s.BOS, string(c.BOS)}, {&s.EOS, string(c.EOS)}, {&s.Unk, h.Model.Unk}} {
		*p.id = -1
		if id, ok := ids[p.name]; ok && p.name != "" {
			*p.id = id
		}
	}
	if first := h.PostProcessor.first(); first != "" {
		if id, ok := ids[first]; ok {
			s.BOS, s.AddBOS = id, true
		}
	}
	if s.Model == ModelSentencePiece {
		s.Scores = h.scores(ids, len(s.Tokens))
		return s, nil
	}
	s.Merges = make([]string, len(h.Model.Merges))
	for i, p := range h.Model.Merges {
		s.Merges[i] = string(p)
	}
	return s, nil
}

// tokens fills in the vocabulary and its types.
func (h *huggingFace) tokens(s *Spec) error {
	n := int32(0)
	for _, id := range h.Model.Vocab {
		n = max(n, id+1)
	}
	for _, a := range h.Added {
		n = max(n, a.ID+1)
	}
	if n > maxTokens || int(n) > 2*(len(h.Model.Vocab)+len(h.Added))+1024 {
		return fmt.Errorf("token ids go up to %d, with %d tokens", n-1, len(h.Model.Vocab)+len(h.Added))
	}
	s.Tokens, s.Types = make([]string, n), make([]TokenType, n)
	for name, id := range h.Model.Vocab {
		if id < 0 || s.Types[id] != 0 {
			return fmt.Errorf("token %q has the id %d, which is negative or taken", name, id)
		}
		s.Tokens[id], s.Types[id] = name, Normal
		if _, ok := byteOf(name); ok && s.Model == ModelSentencePiece {
			s.Types[id] = Byte
		}
	}
	for _, a := range h.Added {
		if a.ID < 0 {
			return fmt.Errorf("token %q has the id %d", a.Content, a.ID)
		}
		s.Tokens[a.ID], s.Types[a.ID] = a.Content, User
		if a.Special {
			s.Types[a.ID] = Control
		} else if s.Model == ModelSentencePiece {
			s.Tokens[a.ID] = strings.ReplaceAll(a.Content, space, " ")
		}
	}
	for id := range s.Tokens {
		if s.Types[id] == 0 {
			s.Tokens[id], s.Types[id] = fmt.Sprintf("[PAD%d]", id), Unused
		}
	}
	return nil
}

// scores makes of the order of merges what SentencePiece has: a token's score,
// the higher the earlier it can be made.
func (h *huggingFace) scores(ids map[string]int32, n int) []float32 {
	scores := make([]float32, n)
	for i := range scores {
		scores[i] = -math.MaxFloat32
	}
	for rank, pair := range h.Model.Merges {
		left, right, ok := cutMerge(string(pair))
		if !ok {
			continue
		}
		if id, ok := ids[left+right]; ok && scores[id] == -math.MaxFloat32 {
			scores[id] = -float32(rank + 1)
		}
	}
	return scores
}

// flat returns the stages of a sequence, or the stage itself.
func (s *stage) flat() []stage {
	if s.Type != "Sequence" {
		return []stage{*s}
	}
	all := append(append([]stage{}, s.Normalizers...), s.PreTokenizers...)
	return append(all, s.Processors...)
}

func (s *stage) has(typ string) bool {
	for _, p := range s.flat() {
		if p.Type == typ {
			return true
		}
	}
	return false
}

// prepends reports whether text gets a space before it.
func (s *stage) prepends() bool {
	for _, p := range s.flat() {
		if p.Type == "Prepend" || p.Type == "Metaspace" && p.PrependScheme != "never" {
			return true
		}
	}
	return false
}

// first returns the token that a template puts before every text, or "".
func (s *stage) first() string {
	for _, p := range s.flat() {
		if p.Type == "TemplateProcessing" && len(p.Single) > 0 && p.Single[0].Special != nil {
			return p.Single[0].Special.ID
		}
	}
	return ""
}

// The ways of cutting text that are known, by their regular expressions.
var expressions = map[string]string{
	`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`: "llama-bpe",
	`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`:      "qwen2",
	`[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|` +
		`[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|` +
		`\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`: "tekken",
}

// name returns what GGUF files call a way of cutting text.
func (s *stage) name() (string, error) {
	var parts []string
	for _, p := range s.flat() {
		switch {
		case p.Type == "ByteLevel" && p.AddPrefixSpace:
			return "", fmt.Errorf("%w: a space before every text", errors.ErrUnsupported)
		case p.Type == "ByteLevel" && (p.UseRegex == nil || *p.UseRegex):
			parts = append(parts, "gpt-2")
		case p.Type == "ByteLevel":
		case p.Type == "Digits" && p.Individual:
			parts = append(parts, "digits")
		case p.Type == "Split" && expressions[p.Pattern.Regex] != "":
			parts = append(parts, expressions[p.Pattern.Regex])
		default:
			return "", fmt.Errorf("%w: text is cut by %s %q", errors.ErrUnsupported, p.Type, p.Pattern.Regex)
		}
	}
	switch all := strings.Join(parts, " "); all {
	case "gpt-2", "llama-bpe", "qwen2", "tekken":
		return all, nil
	case "digits gpt-2":
		return "smollm", nil
	default:
		return "", fmt.Errorf("%w: text is cut by %q", errors.ErrUnsupported, all)
	}
}
