package quant_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/llm/quant"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

const (
	small  = "smollm2-135m-instruct-q4_1.gguf"
	window = 128
)

// tokensOf returns the beginning of the project's own documents, as tokens.
func tokensOf(t testing.TB, model string, most int, files ...string) []int32 {
	t.Helper()
	f, err := gguf.Open(modeltest.Path(t, model))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tok, err := tokenizer.FromGGUF(&f.Meta)
	if err != nil {
		t.Fatal(err)
	}
	var all []int32
	for _, name := range files {
		text, err := os.ReadFile(filepath.Join("..", "..", name))
		if err != nil {
			t.Fatal(err)
		}
		ids, err := tok.Encode(string(text), false)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ids...)
	}
	return all[:min(most, len(all))]
}

func make1(t testing.TB, name, method, format string, activations quant.Activations) string {
	t.Helper()
	src, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	f, err := quant.ParseFormat(format)
	if err != nil {
		t.Fatal(err)
	}
	result := filepath.Join(t.TempDir(), method+format+".gguf")
	if err := quant.Run(context.Background(), src, result, quant.Recipe{Method: quant.Method(method), Format: f, Threads: 2}, activations, nil); err != nil {
		t.Fatal(err)
	}
	return result
}

func measure(t testing.TB, name string, base *quant.Runner, tokens []int32) quant.Quality {
	t.Helper()
	r, err := quant.Load(name, 2, window+1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	q, err := quant.Measure(context.Background(), tokens, window, -1, r.Logits, base.Logits)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// conformance: L4
func TestCalibratedMethodsLoseLessThanRounding(t *testing.T) {
	name := modeltest.Path(t, small)
	base, err := quant.Load(name, 2, window+1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	held := tokensOf(t, small, 4*window, "docs/guide-first-hour.md")
	activations := quant.Calibrate(name, 2, tokensOf(t, small, 8*window, "docs/operations.md"), window, -1)
	// Three bits tell the methods apart best.
	lost := map[string]float64{}
	for _, method := range []string{"rtn", "gptq", "awq"} {
		q := measure(t, make1(t, name, method, "q3_1", activations), base, held)
		lost[method] = q.Divergence
		t.Logf("measured: L4 %s q3_1: perplexity %.2f (%.2f before), divergence %.4f nats, same token %.1f %%", method, q.Perplexity, q.Base, q.Divergence, 100*q.Agreement)
	}
	for _, method := range []string{"gptq", "awq"} {
		if !(lost[method] < lost["rtn"]) {
			t.Errorf("%s diverges by %.4f nats, rounding by %.4f", method, lost[method], lost["rtn"])
		}
	}
}

// tiny writes a model of random weights: two layers whose inputs differ in size.
func tiny(t testing.TB) string {
	t.Helper()
	var m gguf.Meta
	for key, v := range map[string]any{
		gguf.KeyArchitecture: "llama", "llama.block_count": uint32(2), "llama.embedding_length": uint32(64), "llama.feed_forward_length": uint32(128),
		"llama.context_length": uint32(512), "llama.attention.head_count": uint32(4), "llama.attention.head_count_kv": uint32(2),
		"llama.attention.layer_norm_rms_epsilon": float32(1e-5), "llama.rope.freq_base": float32(10000),
	} {
		if err := m.Set(key, v); err != nil {
			t.Fatal(err)
		}
	}
	tensors := []gguf.Tensor{{Name: "token_embd.weight", Dims: []int64{64, 96}}, {Name: "output_norm.weight", Dims: []int64{64}}}
	for i := range 2 {
		for _, w := range []struct {
			name       string
			cols, rows int64
		}{{"attn_norm", 64, 0}, {"ffn_norm", 64, 0}, {"attn_q", 64, 64}, {"attn_k", 64, 32}, {"attn_v", 64, 32}, {"attn_output", 64, 64},
			{"ffn_gate", 64, 128}, {"ffn_up", 64, 128}, {"ffn_down", 128, 64}} {
			dims := []int64{w.cols}
			if w.rows > 0 {
				dims = append(dims, w.rows)
			}
			tensors = append(tensors, gguf.Tensor{Name: fmt.Sprintf("blk.%d.%s.weight", i, w.name), Dims: dims})
		}
	}
	f, err := gguf.New(m, tensors)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	name := filepath.Join(t.TempDir(), "tiny.gguf")
	err = f.Save(name, func(w io.Writer, x *gguf.Tensor) error {
		values := make([]float32, x.Elements())
		for i := range values {
			if len(x.Dims) == 1 {
				values[i] = float32(math.Exp(random.NormFloat64()) / 2) // a few inputs are large
			} else {
				values[i] = float32(random.NormFloat64() / 12)
			}
		}
		raw := make([]byte, x.Size)
		if err := tensor.Quantise(raw, tensor.F32, values); err != nil {
			return err
		}
		_, err := w.Write(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func tinyTokens(n int) []int32 {
	random := rand.New(rand.NewPCG(3, 4))
	out := make([]int32, n)
	for i := range out {
		out[i] = int32(random.IntN(96))
	}
	return out
}

func TestEveryFormatLosesAboutWhatItsBitsSay(t *testing.T) {
	name := tiny(t)
	base, err := quant.Load(name, 2, window+1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	last := 0.0
	for _, format := range []string{"f16", "q8_0", "f8_e4m3", "f8_e5m2"} {
		q := measure(t, make1(t, name, "rtn", format, nil), base, tinyTokens(window))
		t.Logf("%s: divergence %.6f", format, q.Divergence)
		if q.Divergence < last || q.Divergence > 0.05 {
			t.Errorf("%s diverges by %.6f nats, what has more bits by %.6f", format, q.Divergence, last)
		}
		last = q.Divergence
	}
	for _, format := range []string{"bf16", "q4_1", "q4_0", "q3_1", "q3_0"} {
		q := measure(t, make1(t, name, "rtn", format, nil), base, tinyTokens(window))
		t.Logf("%s: divergence %.6f", format, q.Divergence)
	}
}

// Scaling alone must not change what a model computes: rounded to 8 bits, whose error
// is small, a scaled model is the model that it was.
func TestScalingKeepsTheModel(t *testing.T) {
	name := tiny(t)
	base, err := quant.Load(name, 2, window+1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	activations := quant.Calibrate(name, 2, tinyTokens(4*window), window, -1)
	for _, method := range []string{"awq", "gptq"} {
		q := measure(t, make1(t, name, method, "q8_0", activations), base, tinyTokens(window))
		t.Logf("%s: divergence %.6f", method, q.Divergence)
		if q.Divergence > 0.002 {
			t.Errorf("%s diverges by %.6f nats", method, q.Divergence)
		}
	}
}

func TestAnInterruptedRunGoesOnWhereItWas(t *testing.T) {
	name := tiny(t)
	activations := quant.Calibrate(name, 2, tinyTokens(2*window), window, -1)
	whole, err := os.ReadFile(make1(t, name, "gptq", "q4_0", activations))
	if err != nil {
		t.Fatal(err)
	}
	src, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	format, _ := quant.ParseFormat("q4_0")
	recipe := quant.Recipe{Method: quant.GPTQ, Format: format, Threads: 2}
	result := filepath.Join(t.TempDir(), "result.gguf")
	ctx, cancel := context.WithCancel(context.Background())
	err = quant.Run(ctx, src, result, recipe, activations, func(done, all int) {
		if done == 1 {
			cancel()
		}
	})
	if !sandbox.Is(err, sandbox.Canceled) {
		t.Fatal(err)
	}
	if _, err := os.Stat(result); err == nil {
		t.Error("there is a result of a run that was cancelled")
	}
	var seen []int
	if err := quant.Run(context.Background(), src, result, recipe, activations, func(done, _ int) { seen = append(seen, done) }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(seen) != "[1 2 3]" {
		t.Error("layers that were done were done again:", seen)
	}
	if got, _ := os.ReadFile(result); !bytes.Equal(got, whole) {
		t.Error("the result is not that of a run without interruption")
	}
	if _, err := os.Stat(result + ".parts"); err == nil {
		t.Error("parts are left")
	}
}

func TestAnotherRecipeDoesNotUseWhatIsLeft(t *testing.T) {
	name := tiny(t)
	src, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	result := filepath.Join(t.TempDir(), "result.gguf")
	for _, n := range []string{"q8_0", "q4_0"} {
		format, _ := quant.ParseFormat(n)
		ctx, cancel := context.WithCancel(context.Background())
		first := -1
		_ = quant.Run(ctx, src, result, quant.Recipe{Method: quant.RTN, Format: format}, nil, func(done, _ int) {
			if first < 0 {
				first = done
			}
			if done == 2 {
				cancel()
			}
		})
		if first != 0 {
			t.Errorf("%s began with %d layers done", n, first)
		}
	}
	// What is not ours is not removed.
	if err := os.WriteFile(filepath.Join(result+".parts", "mine.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	format, _ := quant.ParseFormat("q8_0")
	if err := quant.Run(context.Background(), src, result, quant.Recipe{Method: quant.RTN, Format: format}, nil, nil); err == nil {
		t.Error("a folder with somebody's file in it was removed")
	}
}

func TestRecipesThatMakeNoSenseAreRefused(t *testing.T) {
	name := tiny(t)
	src, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	q4, _ := quant.ParseFormat("q4_0")
	f16, _ := quant.ParseFormat("f16")
	none := func(context.Context, func(string, []float32, int)) error { return nil }
	failing := func(context.Context, func(string, []float32, int)) error { return errors.New("broken model") }
	for want, c := range map[string]struct {
		recipe      quant.Recipe
		activations quant.Activations
	}{
		"needs text":     {quant.Recipe{Method: quant.GPTQ, Format: q4}, nil},
		"is not defined": {quant.Recipe{Method: quant.AWQ, Format: f16}, none},
		"is not known":   {quant.Recipe{Method: "guess", Format: q4}, nil},
		"no format":      {quant.Recipe{Method: quant.RTN}, nil},
		"text is empty":  {quant.Recipe{Method: quant.GPTQ, Format: q4}, none},
		"broken model":   {quant.Recipe{Method: quant.AWQ, Format: q4}, failing},
	} {
		err := quant.Run(context.Background(), src, filepath.Join(t.TempDir(), "x"), c.recipe, c.activations, nil)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	if _, err := quant.ParseFormat("q1"); err == nil {
		t.Error("q1 is no format")
	}
}
