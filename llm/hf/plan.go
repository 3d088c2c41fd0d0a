package hf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strings"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/safetensors"
	"github.com/atoll-run/atoll/tensor"
)

// A plan says what a tensor of the GGUF file is made of.
type plan struct {
	source string  // the tensor, or what all its parts begin with
	layout *layout // how it is quantised; nil: it is not
	heads  int     // rows are ordered for RoPE over so many heads; 0: as they are
	plus   float32
	values []float32 // computed, not read
}

// names of modules, in and outside of layers.
var (
	layerName = regexp.MustCompile(`^layers\.(\d{1,4})\.(.+)$`)
	outside   = map[string]string{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
	inside    = map[string]string{
		"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
		"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
		"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
		"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
	}
	gemmaInside = map[string]string{
		"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
	}
)

// translate returns GGUF's name of a module; empty for one that has no place there.
func (c *modelConfig) translate(module string) string {
	if name, ok := outside[module]; ok {
		return name
	}
	m := layerName.FindStringSubmatch(module)
	if m == nil {
		return ""
	}
	if strings.HasPrefix(c.arch, "gemma") {
		if name, ok := gemmaInside[m[2]]; ok {
			return "blk." + m[1] + "." + name
		}
	}
	if name, ok := inside[m[2]]; ok {
		return "blk." + m[1] + "." + name
	}
	return ""
}

// plan goes over all tensors of the folder and returns those of the file.
func (m *Model) plan() ([]gguf.Tensor, error) {
	m.plans = map[string]plan{}
	var tensors []gguf.Tensor
	add := func(t gguf.Tensor, p plan) error {
		if _, taken := m.plans[t.Name]; taken {
			return fmt.Errorf("tensor %s is there twice", t.Name)
		}
		m.plans[t.Name] = p
		tensors = append(tensors, t)
		return nil
	}
	for _, full := range m.folder.Names() {
		name := strings.TrimPrefix(strings.TrimPrefix(full, "language_model."), "model.")
		name = strings.TrimPrefix(name, "language_model.")
		dot := strings.LastIndexByte(name, '.')
		if dot < 0 {
			continue
		}
		module, part := name[:dot], name[dot+1:]
		target := m.config.translate(module)
		switch {
		case strings.HasPrefix(full, "vision_tower.") || strings.HasPrefix(full, "multi_modal_projector.") || strings.HasSuffix(full, "rotary_emb.inv_freq"):
			continue // the engine reads text only; inv_freq follows from the configuration
		case target == "":
			return nil, fmt.Errorf("%w: tensor %q is not part of the architecture %s", errors.ErrUnsupported, full, m.config.arch)
		case target == "output" && m.config.Tied != nil && *m.config.Tied:
			continue
		}
		p := plan{source: strings.TrimSuffix(full, "."+part)}
		p.order(&m.config, target)
		t, err := m.tensor(target, part, full, &p)
		if err != nil {
			return nil, fmt.Errorf("tensor %q: %w", full, err)
		}
		if t.Name == "" {
			continue
		}
		if err := add(t, p); err != nil {
			return nil, err
		}
	}
	if f := m.config.ropeFactors(); f != nil {
		return tensors, add(gguf.Tensor{Name: "rope_freqs.weight", Type: tensor.F32, Dims: []int64{int64(len(f))}}, plan{values: f})
	}
	return tensors, nil
}

// order sets what changes in the rows of a tensor. Llama's files turn neighbours, not
// halves, so rows of queries and keys are dealt out anew; Gemma's norms are stored less
// one.
func (p *plan) order(c *modelConfig, target string) {
	if c.arch == "llama" && strings.HasSuffix(target, ".attn_q") {
		p.heads = c.Heads
	}
	if c.arch == "llama" && strings.HasSuffix(target, ".attn_k") {
		p.heads = c.KVHeads
	}
	if strings.HasPrefix(c.arch, "gemma") && strings.HasSuffix(target, "_norm") {
		p.plus = 1
	}
}

// tensor returns what a part of a module becomes; no name if it is only a piece of
// another part.
func (m *Model) tensor(target, part, full string, p *plan) (gguf.Tensor, error) {
	in, _ := m.folder.Tensor(full)
	if part != "bias" {
		l, err := m.config.Quantisation.layoutOf(m.folder, p.source)
		if err != nil {
			return gguf.Tensor{}, err
		}
		if l != nil && part != l.part {
			return gguf.Tensor{}, nil
		}
		if l != nil {
			p.layout = l
			return gguf.Tensor{Name: target + ".weight", Type: l.typ, Dims: []int64{int64(l.cols), int64(l.rows)}}, p.fits(int64(l.rows))
		}
	}
	if part != "weight" && part != "bias" {
		return gguf.Tensor{}, fmt.Errorf("%w: a part %q of a module", errors.ErrUnsupported, part)
	}
	t := gguf.Tensor{Name: target + "." + part}
	switch len(in.Shape) {
	case 1:
		t.Type, t.Dims = tensor.F32, in.Shape
	case 2:
		t.Dims = []int64{in.Shape[1], in.Shape[0]}
		switch in.DType {
		case "F32":
			t.Type = tensor.F32
		case "F16":
			t.Type = tensor.F16
		case "BF16", "F8_E4M3", "F8_E5M2":
			t.Type = tensor.BF16
		default:
			return t, fmt.Errorf("%w: weights of type %s", errors.ErrUnsupported, in.DType)
		}
	default:
		return t, fmt.Errorf("%w: the shape %v", errors.ErrUnsupported, in.Shape)
	}
	return t, p.fits(in.Shape[0])
}

// fits refuses rows that do not divide into heads.
func (p *plan) fits(rows int64) error {
	if p.heads > 0 && rows%int64(2*p.heads) != 0 {
		return fmt.Errorf("%d rows do not divide into %d heads", rows, p.heads)
	}
	return nil
}

// row returns which row of the source is row r of the file, of so many.
func (p *plan) row(r, rows int) int {
	if p.heads == 0 {
		return r
	}
	head := rows / p.heads
	h, i := r/head, r%head
	return h*head + i%2*(head/2) + i/2
}

// write writes a tensor's bytes.
func (m *Model) write(w io.Writer, t *gguf.Tensor) error {
	p := m.plans[t.Name]
	if p.values != nil {
		return binary.Write(w, binary.LittleEndian, p.values)
	}
	rows := t.Rows()
	if len(t.Dims) == 1 {
		rows = t.Cols() // a vector is as many rows of one
	}
	raw, err := m.rows(&p, t)
	if err != nil {
		return fmt.Errorf("%s: %w", t.Name, err)
	}
	size := len(raw) / rows
	var out bytes.Buffer
	out.Grow(len(raw))
	for r := range rows {
		at := p.row(r, rows) * size
		out.Write(raw[at : at+size])
	}
	_, err = w.Write(out.Bytes())
	return err
}

// rows returns a tensor's bytes as the file has them, but in the source's order of
// rows.
func (m *Model) rows(p *plan, t *gguf.Tensor) ([]byte, error) {
	if p.layout != nil {
		return p.layout.encode()
	}
	full := p.source + t.Name[strings.LastIndexByte(t.Name, '.'):]
	in, _ := m.folder.Tensor(full)
	raw, err := m.folder.Read(full)
	if err != nil {
		return nil, err
	}
	if string(in.DType) == t.Type.String() && p.plus == 0 {
		return raw, nil
	}
	values, err := safetensors.Floats(in.DType, raw)
	if err != nil {
		return nil, err
	}
	for i := range values {
		values[i] += p.plus
		if math.IsNaN(float64(values[i])) {
			return nil, errors.New("a weight is not a number")
		}
	}
	out := make([]byte, t.Size)
	return out, tensor.Quantise(out, t.Type, values)
}
