package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/tensor"
)

// The shape of TinyLlama-1.1B.
const (
	dim, heads, kvHeads, ffn = 2048, 32, 4, 5632
)

// smolLM2 fetches a real model and returns its file, and how many bytes of weights a token reads.
func smolLM2(ctx context.Context) (file string, bytes int64, err error) {
	out, err := exec.CommandContext(ctx, "scripts/models", "smollm2-135m-instruct-q4_1.gguf").Output()
	if err != nil {
		return "", 0, fmt.Errorf("fetch a model: %w", err)
	}
	file = strings.TrimSpace(string(out))
	r, err := gguf.Open(file)
	if err != nil {
		return "", 0, err
	}
	for i := range r.Tensors {
		bytes += r.Tensors[i].Size // the embedding is the last product's weights too
	}
	return file, bytes, r.Close()
}

// write makes a model file with weights of one kind and returns how many bytes of them a token reads.
func write(ctx context.Context, file, kind string, layers int) (int64, error) {
	real, _, err := smolLM2(ctx) // llama.cpp wants a vocabulary
	if err != nil {
		return 0, err
	}
	from, err := gguf.Open(real)
	if err != nil {
		return 0, err
	}
	defer func() { _ = from.Close() }()
	meta := from.Meta.Clone()
	words, _ := meta.Strings("tokenizer.ggml.tokens")
	for key, value := range map[string]any{
		"general.architecture": "llama", "general.name": "bench", "llama.block_count": uint32(layers), "llama.context_length": uint32(4096),
		"llama.embedding_length": uint32(dim), "llama.feed_forward_length": uint32(ffn), "llama.attention.head_count": uint32(heads),
		"llama.attention.head_count_kv": uint32(kvHeads), "llama.rope.dimension_count": uint32(dim / heads), "llama.vocab_size": uint32(len(words)),
		"llama.rope.freq_base": float32(10000), "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
	} {
		if err := meta.Set(key, value); err != nil {
			return 0, err
		}
	}
	meta.Delete("general.file_type")
	tensors, err := list(kind, layers, len(words))
	if err != nil {
		return 0, err
	}
	f, err := gguf.New(meta, tensors)
	if err != nil {
		return 0, err
	}
	var bytes int64
	for i := range f.Tensors {
		bytes += f.Tensors[i].Size // the embedding is the last product's weights too
	}
	random := map[tensor.Type][]byte{}
	return bytes, f.Save(file, func(w io.Writer, t *gguf.Tensor) error { return fill(w, t, random) })
}

// list names the tensors. Q4_K_M is llama.cpp's mixture: the more delicate half in Q6_K.
func list(kind string, layers, vocabulary int) ([]gguf.Tensor, error) {
	plain, fine := tensor.Q4_K, tensor.Q6_K
	if kind != "Q4_K_M" {
		t, err := tensor.ParseType(kind)
		if err != nil {
			return nil, err
		}
		plain, fine = t, t
	}
	kv := dim / heads * kvHeads
	tensors := []gguf.Tensor{
		{Name: "token_embd.weight", Type: fine, Dims: []int64{dim, int64(vocabulary)}},
		{Name: "output_norm.weight", Type: tensor.F32, Dims: []int64{dim}},
	}
	for i := range layers {
		better := plain
		if i < layers/8 || i >= 7*layers/8 || (i-layers/8)%3 == 2 {
			better = fine
		}
		for _, t := range []struct {
			name       string
			typ        tensor.Type
			cols, rows int64
		}{
			{"attn_q", plain, dim, dim}, {"attn_k", plain, dim, int64(kv)}, {"attn_v", better, dim, int64(kv)}, {"attn_output", plain, dim, dim},
			{"ffn_gate", plain, dim, ffn}, {"ffn_up", plain, dim, ffn}, {"ffn_down", better, ffn, dim},
		} {
			tensors = append(tensors, gguf.Tensor{Name: fmt.Sprintf("blk.%d.%s.weight", i, t.name), Type: t.typ, Dims: []int64{t.cols, t.rows}})
		}
		for _, name := range []string{"attn_norm", "ffn_norm"} {
			tensors = append(tensors, gguf.Tensor{Name: fmt.Sprintf("blk.%d.%s.weight", i, name), Type: tensor.F32, Dims: []int64{dim}})
		}
	}
	return tensors, nil
}

// fill writes a tensor: ones for a norm, or some random rows again and again.
func fill(w io.Writer, t *gguf.Tensor, random map[tensor.Type][]byte) error {
	const rows = 64
	if len(t.Dims) == 1 {
		ones := make([]float32, t.Cols())
		for i := range ones {
			ones[i] = 1
		}
		b := make([]byte, 4*len(ones))
		if err := tensor.Quantise(b, tensor.F32, ones); err != nil {
			return err
		}
		_, err := w.Write(b)
		return err
	}
	if random[t.Type] == nil {
		r := rand.New(rand.NewPCG(1, uint64(t.Type)))
		x := make([]float32, rows*ffn)
		for i := range x {
			x[i] = float32(r.NormFloat64()) * 0.02
		}
		b := make([]byte, t.Type.Bytes(len(x)))
		if err := tensor.Quantise(b, t.Type, x); err != nil {
			return err
		}
		random[t.Type] = b
	}
	for left := int(t.Size); left > 0; {
		b := random[t.Type]
		n, err := w.Write(b[:min(left, len(b))])
		if err != nil {
			return err
		}
		left -= n
	}
	return nil
}
