package tokenizer_test

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
)

func fromSentencePiece(t testing.TB, conf io.Reader) tokenizer.Spec {
	t.Helper()
	f, err := os.Open(modeltest.Path(t, "mistral/tokenizer.model"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	spec, err := tokenizer.ReadSentencePiece(f, conf)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestTokensThatWereAddedLaterBelongToTheVocabulary(t *testing.T) {
	spec := fromSentencePiece(t, strings.NewReader(`{"add_bos_token": false, "eos_token": "<|im_end|>", "added_tokens_decoder": {
		"1": {"content": "<s>", "special": true}, "32768": {"content": "<|im_end|>", "special": true}, "32769": {"content": "<tool>"}}}`))
	tok, err := tokenizer.New(spec)
	if err != nil {
		t.Fatal(err)
	}
	if spec.AddBOS || tok.EOS() != 32768 || tok.Len() != 32770 || !tok.Control(32768) || tok.Control(32769) {
		t.Errorf("begins %v, ends with %d of %d", spec.AddBOS, tok.EOS(), tok.Len())
	}
	ids, err := tok.Encode("a<tool>", false)
	if err != nil || len(ids) != 2 || ids[1] != 32769 {
		t.Error(ids, err)
	}
}

// message makes one of SentencePiece's messages of fields: uint64 or []byte.
func message(fields ...any) []byte {
	var b []byte
	for i := 0; i < len(fields); i += 2 {
		n := protowire.Number(fields[i].(int))
		switch v := fields[i+1].(type) {
		case int:
			b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
		case uint32:
			b = protowire.AppendFixed32(protowire.AppendTag(b, n, protowire.Fixed32Type), v)
		case []byte:
			b = protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
		}
	}
	return b
}

func TestSentencePiecesThatAreNotKnownAreRefusedWithTheReason(t *testing.T) {
	piece, bpe, plain := message(1, []byte("a"), 2, uint32(0)), message(3, 2), message(4, 0)
	for reason, c := range map[string]struct {
		raw  []byte
		kind sandbox.Kind
	}{
		"not BPE":                {message(1, piece, 2, message(3, 1), 3, plain), sandbox.Unsupported},
		"(number 1)":             {message(1, piece, 3, plain), sandbox.Unsupported},
		"normalised by a map":    {message(1, piece, 2, bpe, 3, message(2, []byte{1}, 4, 0)), sandbox.Unsupported},
		"spaces are removed":     {message(1, piece, 2, bpe, 3, message(3, 1)), sandbox.Unsupported},
		"at the end of words":    {message(1, piece, 2, message(3, 2, 24, 1), 3, plain), sandbox.Unsupported},
		"a vocabulary has 1 to":  {message(2, bpe, 3, plain), sandbox.Invalid},
		"has the type 7":         {message(1, message(1, []byte("a"), 3, 7), 2, bpe, 3, plain), sandbox.Invalid},
		"unexpected EOF":         {message(1, piece)[:3], sandbox.Invalid},
		"outside of the vocabul": {message(1, piece, 2, message(3, 2, 40, 9), 3, plain), sandbox.Invalid},
	} {
		_, err := tokenizer.ReadSentencePiece(bytes.NewReader(c.raw), nil)
		if err == nil || !strings.Contains(err.Error(), reason) || !sandbox.Is(err, c.kind) {
			t.Errorf("want %q, got %v", reason, err)
		}
	}
}

// FuzzReadSentencePiece: whatever is taken can be encoded with, or is refused.
func FuzzReadSentencePiece(f *testing.F) {
	var pieces []any
	for _, c := range []string{"<unk>", "<s>", "</s>", "a", "b", "ab"} {
		pieces = append(pieces, 1, message(1, []byte(c), 2, uint32(0)))
	}
	f.Add(message(append(pieces, 2, message(3, 2), 3, message(4, 0))...), "{}")
	f.Fuzz(func(t *testing.T, raw []byte, conf string) {
		spec, err := tokenizer.ReadSentencePiece(bytes.NewReader(raw), strings.NewReader(conf))
		if err != nil {
			return
		}
		tok, err := tokenizer.New(spec)
		if err != nil {
			return
		}
		ids, err := tok.Encode("ab a\x00é", true)
		if err != nil {
			t.Fatal(err)
		}
		tok.Decode(ids)
	})
}
