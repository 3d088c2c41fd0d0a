package model_test

import (
	"math"
	"os"
	"testing"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/tensor"
)

// What rounding keys and values may cost, in nats of divergence from what F16 says, in the mean. Gemma's one head of keys, whose
// products with queries are large, suffers most from 4 bits.
var mostLost = map[string]map[tensor.Type]float64{
	"smollm2-135m-instruct-q4_1.gguf": {tensor.F32: 0.01, tensor.Int8: 0.01, tensor.Int4: 0.12},
	"gemma-3-270m-q4_k_m.gguf":        {tensor.F32: 0.01, tensor.Int8: 0.01, tensor.Int4: 0.8},
}

// conformance: L5
func TestRoundedKeysAndValuesHardlyChangeWhatRealModelsSay(t *testing.T) {
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for file, most := range mostLost {
		t.Run(file, func(t *testing.T) {
			m := openFile(t, file)
			tokens := encode(t, file, string(text))[:224]
			base, perplexity := readAs(t, m, tensor.F16, tokens)
			bytes := m.Layout(tensor.F16, 32).TokenBytes()
			for _, typ := range []tensor.Type{tensor.F32, tensor.Int8, tensor.Int4} {
				logits, p := readAs(t, m, typ, tokens)
				kl := divergence(base, logits, m.Config().Vocab)
				t.Logf("measured: L5 %s, keys and values in %v: perplexity %.3f (F16 %.3f), divergence %.5f nats; %d bytes a token (F16 %d)",
					file, typ, p, perplexity, kl, m.Layout(typ, 32).TokenBytes(), bytes)
				if kl > most[typ] || math.IsNaN(kl) {
					t.Errorf("%v: the distributions diverge by %.5f nats", typ, kl)
				}
			}
		})
	}
}

func encode(t *testing.T, file, text string) []int32 {
	t.Helper()
	r, err := gguf.Open(modeltest.Path(t, file))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	tok, err := tokenizer.FromGGUF(&r.Meta)
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := tok.Encode(text, true)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

// readAs returns the logits of the last tokens of a text and its perplexity.
func readAs(t *testing.T, m *model.Model, typ tensor.Type, tokens []int32) ([]float32, float64) {
	t.Helper()
	const pageLen, most = 32, 32
	kv, err := cache.New(m.Layout(typ, pageLen), len(tokens)/pageLen+1, cache.Root(""))
	if err != nil {
		t.Fatal(err)
	}
	defer kv.Close()
	seq, vocab := kv.NewSequence(""), m.Config().Vocab
	seq.Grow(len(tokens))
	var logits []float32
	for at := 0; at < len(tokens); at += most {
		n := min(most, len(tokens)-at)
		part := model.Part{Pages: seq.Pages(), Start: at, Tokens: n}
		if at >= len(tokens)-32 {
			part.Last = n
		}
		r, err := m.Forward(t.Context(), kv, &model.Batch{Tokens: tokens[at : at+n], Parts: []model.Part{part}})
		if err != nil {
			t.Fatal(err)
		}
		logits = append(logits, r.Logits...)
	}
	sum, rows := 0.0, len(logits)/vocab
	for i := range rows - 1 {
		row := logits[i*vocab : (i+1)*vocab]
		sum += logSumExp(row) - float64(row[tokens[len(tokens)-rows+i+1]])
	}
	return logits, math.Exp(sum / float64(rows-1))
}

// divergence is the mean Kullback-Leibler divergence of b's distributions from a's, in nats.
func divergence(a, b []float32, vocab int) float64 {
	sum := 0.0
	for at := 0; at < len(a); at += vocab {
		x, y := a[at:at+vocab], b[at:at+vocab]
		nx, ny := logSumExp(x), logSumExp(y)
		for i := range x {
			p := float64(x[i]) - nx
			sum += math.Exp(p) * (p - float64(y[i]) + ny)
		}
	}
	return sum / float64(len(a)/vocab)
}
