package model_test

import (
	"encoding/json"
	"math"
	"os"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/modeltest"
)

// openFile opens a model that scripts/models knows.
func openFile(t testing.TB, name string) *model.Model {
	t.Helper()
	r, err := gguf.Open(modeltest.Path(t, name))
	if err != nil {
		t.Fatal(err)
	}
	src, err := model.FromGGUFData(r.File, r)
	if err != nil {
		t.Fatal(err)
	}
	m := open(t, src, model.Options{})
	t.Cleanup(func() { _ = r.Close() })
	return m
}

// likely is what the reference says of one position of a real model.
type likely struct {
	Position int
	Tokens   []int32   // the likeliest
	LogProbs []float32 // of these
}

// Weights are quantised and so are activations, to 8 bits, in our products but not
// in the reference's; the divergence of the two distributions over the reference's
// 40 likeliest tokens must stay below this, in nats, at every position.
const maxDivergence = 0.02

// conformance: L1
func TestRealModelsSayWhatTheReferenceSays(t *testing.T) {
	for name, file := range map[string]string{"smollm2-135m": "smollm2-135m-instruct-q4_1.gguf", "gemma3-270m": "gemma-3-270m-q4_k_m.gguf"} {
		t.Run(name, func(t *testing.T) {
			b, err := os.ReadFile("testdata/" + name + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var ref struct {
				Tokens []int32
				At     []likely
			}
			if err := json.Unmarshal(b, &ref); err != nil {
				t.Fatal(err)
			}
			m := openFile(t, file)
			logits, vocab := begin(t, m).next(t, m, ref.Tokens), m.Config().Vocab
			sum, worst, agree := 0.0, 0.0, 0
			for _, at := range ref.At {
				row := logits[at.Position*vocab : (at.Position+1)*vocab]
				norm, best := logSumExp(row), 0
				for i, v := range row {
					if v > row[best] {
						best = i
					}
				}
				if int32(best) == at.Tokens[0] {
					agree++
				}
				divergence, rest, ours := 0.0, 1.0, 1.0
				for i, token := range at.Tokens {
					p, q := float64(at.LogProbs[i]), float64(row[token])-norm
					divergence += math.Exp(p) * (p - q)
					rest -= math.Exp(p)
					ours -= math.Exp(q)
				}
				if rest > 1e-6 && ours > 1e-6 { // all other tokens as one
					divergence += rest * math.Log(rest/ours)
				}
				sum += divergence
				if worst = max(worst, divergence); divergence > maxDivergence || math.IsNaN(divergence) {
					t.Errorf("position %d: the distributions diverge by %.4f", at.Position, divergence)
				}
			}
			t.Logf("measured: L1 %s: divergence from the reference %.5f nats in the mean, %.5f at worst; the likeliest token agrees at %d of %d positions",
				name, sum/float64(len(ref.At)), worst, agree, len(ref.At))
			if agree < len(ref.At)*9/10 {
				t.Errorf("the likeliest token agrees at %d of %d positions", agree, len(ref.At))
			}
		})
	}
}

func logSumExp(x []float32) float64 {
	top, sum := math.Inf(-1), 0.0
	for _, v := range x {
		top = max(top, float64(v))
	}
	for _, v := range x {
		sum += math.Exp(float64(v) - top)
	}
	return top + math.Log(sum)
}
