package tokenizer

import (
	"fmt"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
)

// The keys of a vocabulary in a GGUF file.
const (
	keyModel       = "tokenizer.ggml.model"
	keyPre         = "tokenizer.ggml.pre"
	keyTokens      = "tokenizer.ggml.tokens"
	keyTypes       = "tokenizer.ggml.token_type"
	keyScores      = "tokenizer.ggml.scores"
	keyMerges      = "tokenizer.ggml.merges"
	keyBOS         = "tokenizer.ggml.bos_token_id"
	keyEOS         = "tokenizer.ggml.eos_token_id"
	keyEOT         = "tokenizer.ggml.eot_token_id"
	keyUnk         = "tokenizer.ggml.unknown_token_id"
	keyAddBOS      = "tokenizer.ggml.add_bos_token"
	keyAddEOS      = "tokenizer.ggml.add_eos_token"
	keySpacePrefix = "tokenizer.ggml.add_space_prefix"
)

// FromGGUF makes the tokenizer that a file's metadata describes. Errors are as
// those of New.
func FromGGUF(m *gguf.Meta) (*Tokenizer, error) {
	spec, err := SpecOf(m)
	if err != nil {
		return nil, err
	}
	return New(spec)
}

// SpecOf reads a vocabulary from a file's metadata. Errors are Invalid and
// Unsupported.
func SpecOf(m *gguf.Meta) (Spec, error) {
	const op = "tokenizer.SpecOf"
	var s Spec
	var ok bool
	if s.Model, ok = m.String(keyModel); !ok {
		return s, sandbox.Errorf(op, sandbox.Invalid, "", "the file has no tokenizer")
	}
	if s.Model != ModelBPE && s.Model != ModelSentencePiece {
		return s, sandbox.Errorf(op, sandbox.Unsupported, "", "tokenizer model %q is not supported, only %q and %q", s.Model, ModelBPE, ModelSentencePiece)
	}
	s.Pre, _ = m.String(keyPre)
	s.Tokens, _ = m.Strings(keyTokens)
	s.Scores, _ = m.Floats(keyScores)
	s.Merges, _ = m.Strings(keyMerges)
	if types, ok := m.Ints(keyTypes); ok {
		s.Types = make([]TokenType, len(types))
		for i, t := range types {
			s.Types[i] = TokenType(t)
		}
	} else {
		s.Types = make([]TokenType, len(s.Tokens))
		for i := range s.Types {
			s.Types[i] = Normal
		}
	}
	s.defaults()
	for key, to := range map[string]*int32{keyBOS: &s.BOS, keyEOS: &s.EOS, keyEOT: &s.EOT, keyUnk: &s.Unk} {
		if id, ok := m.Int(key); ok {
			if id < 0 || id >= int64(len(s.Tokens)) {
				return s, sandbox.E(op, sandbox.Invalid, "", fmt.Errorf("%s is %d, outside of the vocabulary of %d", key, id, len(s.Tokens)))
			}
			*to = int32(id)
		}
	}
	for key, to := range map[string]*bool{keyAddBOS: &s.AddBOS, keyAddEOS: &s.AddEOS, keySpacePrefix: &s.SpacePrefix} {
		if v, ok := m.Bool(key); ok {
			*to = v
		}
	}
	return s, nil
}

// defaults sets what holds when a file does not say otherwise.
func (s *Spec) defaults() {
	s.BOS, s.EOS, s.EOT, s.Unk = -1, -1, -1, -1
	if s.Model == ModelSentencePiece {
		s.AddBOS, s.SpacePrefix = true, true
		if len(s.Tokens) > 2 {
			s.Unk, s.BOS, s.EOS = 0, 1, 2
		}
		return
	}
	switch s.Pre {
	case "llama-bpe", "llama3", "llama-v3":
		s.AddBOS, s.WholeWords = true, true
	case "tekken":
		s.AddBOS, s.WholeWords = true, true
	case "qwen2":
		s.NFC = true
	}
}

// Store writes a vocabulary into metadata, as SpecOf reads it.
func (s *Spec) Store(m *gguf.Meta) error {
	types := make([]int32, len(s.Types))
	for i, t := range s.Types {
		types[i] = int32(t)
	}
	pairs := []struct {
		key   string
		value any
		set   bool
	}{
		{keyModel, s.Model, true}, {keyPre, s.Pre, s.Pre != ""}, {keyTokens, s.Tokens, true}, {keyTypes, types, true},
		{keyScores, s.Scores, s.Scores != nil}, {keyMerges, s.Merges, s.Merges != nil},
		{keyBOS, uint32(s.BOS), s.BOS >= 0}, {keyEOS, uint32(s.EOS), s.EOS >= 0}, {keyEOT, uint32(s.EOT), s.EOT >= 0},
		{keyUnk, uint32(s.Unk), s.Unk >= 0}, {keyAddBOS, s.AddBOS, true}, {keyAddEOS, s.AddEOS, true},
		{keySpacePrefix, s.SpacePrefix, true},
	}
	for _, p := range pairs {
		if !p.set {
			continue
		}
		if err := m.Set(p.key, p.value); err != nil {
			return sandbox.E("tokenizer.Store", sandbox.Invalid, "", err)
		}
	}
	return nil
}
