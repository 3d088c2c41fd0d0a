package quant

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/atoll-run/atoll/llm/gguf"
)

// seen is under which name the inputs of a tensor were shown.
var seen = map[string]string{
	"attn_q": "attn_q", "attn_k": "attn_q", "attn_v": "attn_q", "attn_output": "attn_output",
	"ffn_gate": "ffn_gate", "ffn_up": "ffn_gate", "ffn_down": "ffn_down",
}

// layer rounds the tensors of one layer and returns their bytes in its order.
func (j *job) layer(l layer) ([][]byte, error) {
	weights, tensors := map[string][]float32{}, map[string]*gguf.Tensor{}
	for _, t := range l.tensors {
		w, err := j.load(t)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.Name, err)
		}
		weights[t.Name], tensors[t.Name] = w, t
	}
	if j.recipe.Method == AWQ && l.prefix != "" {
		if err := j.awq(l.prefix, weights, tensors); err != nil {
			return nil, err
		}
	}
	roots := map[string][]float32{}
	out := make([][]byte, len(l.tensors))
	for i, t := range l.tensors {
		raw, err := j.round(l.prefix, t, weights[t.Name], roots)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.Name, err)
		}
		out[i] = raw
	}
	return out, nil
}

// round returns the bytes of a tensor. roots keeps what tensors with the same inputs
// share.
func (j *job) round(prefix string, t *gguf.Tensor, w []float32, roots map[string][]float32) ([]byte, error) {
	typ := j.target(t)
	input := prefix + seen[strings.TrimSuffix(strings.TrimPrefix(t.Name, prefix), ".weight")] + ".weight"
	s := j.stats[input]
	format := j.recipe.Format
	if typ != format.Type || t.Name == "token_embd.weight" || t.Name == "output.weight" {
		format = Format{Type: typ}
	}
	if format.round == nil || s == nil {
		return format.rtn(j.pool, w, t.Cols(), nil)
	}
	if s.cols != t.Cols() {
		return nil, fmt.Errorf("%d columns and inputs of %d numbers", t.Cols(), s.cols)
	}
	if j.recipe.Method == AWQ {
		return format.rtn(j.pool, w, t.Cols(), s.importance())
	}
	if roots[input] == nil {
		r, err := s.root(j.pool)
		if err != nil {
			return nil, err
		}
		roots[input] = r
	}
	return format.gptq(j.pool, w, t.Cols(), roots[input], s.importance())
}

// assemble writes the file from the parts.
func (j *job) assemble(result string, parts *parts) error {
	meta := j.src.Meta.Clone()
	if err := meta.Set("general.quantization_version", uint32(2)); err != nil {
		return err
	}
	if err := meta.Set("atoll.quantised.by", string(j.recipe.Method)+" "+j.recipe.Format.Name); err != nil {
		return err
	}
	meta.Delete("general.file_type") // a number for what llama.cpp makes
	var tensors []gguf.Tensor
	for i := range j.layers {
		for _, t := range j.layers[i].tensors {
			tensors = append(tensors, gguf.Tensor{Name: t.Name, Type: j.target(t), Dims: t.Dims})
		}
	}
	f, err := gguf.New(meta, tensors)
	if err != nil {
		return err
	}
	n, left := 0, len(j.layers[0].tensors)
	var part io.ReadCloser
	defer func() {
		if part != nil {
			_ = part.Close()
		}
	}()
	return f.Save(result, func(w io.Writer, t *gguf.Tensor) error {
		for part == nil || left == 0 {
			if part != nil {
				if err := part.Close(); err != nil {
					return err
				}
				n++
			}
			var err error
			if part, err = parts.open(n); err != nil {
				return err
			}
			left = len(j.layers[n].tensors)
		}
		left--
		if _, err := io.CopyN(w, part, t.Size); err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("what was kept of layer %d is too short; remove %s", n, parts.dir)
			}
			return err
		}
		return nil
	})
}

// fingerprint tells sources and recipes apart.
func (j *job) fingerprint() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %v %d %q\n", j.recipe.Method, j.recipe.Format.Name, j.recipe.Embedding, j.src.End(), j.recipe.Calibration)
	for _, t := range j.src.Tensors {
		fmt.Fprintf(&b, "%s %v %v\n", t.Name, t.Type, t.Dims)
	}
	sample := make([]byte, 1<<10)
	for i := range j.src.Tensors {
		t := &j.src.Tensors[i]
		n, _ := j.src.Section(t).ReadAt(sample[:min(int64(len(sample)), t.Size)], t.Size/2)
		fmt.Fprintf(&b, "%x\n", tensorSum(sample[:n]))
	}
	return b.String()
}

// tensorSum is FNV-1a, which is enough to notice another model.
func tensorSum(b []byte) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}
