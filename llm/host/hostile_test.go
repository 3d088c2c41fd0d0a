package host

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/chat"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/tokenizer"
)

// Metadata that is missing, cut, of another kind or absurd is refused or lived with, whichever key it is.
func TestNoMetadataBreaksAModelsFront(t *testing.T) {
	for _, file := range []string{smol, "gemma-3-270m-q4_k_m.gguf"} {
		r, err := gguf.Open(modeltest.Path(t, file))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for key, value := range r.Meta.All() {
			if _, list := r.Meta.Strings(key); file != smol && !list && strings.HasPrefix(key, "tokenizer.") {
				continue // a large vocabulary takes its time, and the other has had them
			}
			for _, bad := range spoilt(value) {
				f := *r.File
				f.Meta = r.Meta.Clone()
				f.Meta.Delete(key)
				if bad != nil {
					if err := f.Meta.Set(key, bad); err != nil {
						t.Fatal(err)
					}
				}
				if strings.HasPrefix(key, "tokenizer.") {
					readTokens(&f)
				} else if src, err := model.FromGGUFData(&f, r); err == nil {
					_, _ = model.Weights(src, model.Shard{})
				}
			}
		}
	}
}

// readTokens uses what a front says of tokens, if it can be read at all.
func readTokens(f *gguf.File) {
	if text, ok := f.Meta.String("tokenizer.chat_template"); ok {
		_, _ = chat.Parse(text)
	}
	tokens, err := tokenizer.FromGGUF(&f.Meta)
	if err != nil {
		return
	}
	list, err := tokens.EncodePrompt("Hello, <|im_start|> wörld 你好\x00", true)
	if err == nil {
		_ = tokens.Decode(list)
	}
	_, _, _ = tokens.Name(tokens.BOS()), tokens.Name(tokens.EOS()), tokens.Stops()
}

// spoilt is what may stand in a value's place; nil is nothing.
func spoilt(value any) []any {
	list := []any{nil, "x", uint32(math.MaxUint32), int64(math.MinInt64), math.NaN(), float32(0), []int32{}}
	switch v := value.(type) {
	case []string:
		return append(list[:2], v[:len(v)/2], slices.Repeat([]string{""}, len(v)))
	case []float32:
		return append(list[:2], v[:len(v)/2], slices.Repeat([]float32{float32(math.NaN())}, len(v)))
	case []int32:
		return append(list[:2], v[:len(v)/2], slices.Repeat([]int32{-1}, len(v)), slices.Repeat([]int32{3}, len(v)))
	}
	return list
}
