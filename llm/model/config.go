// Package model computes what language models think of the next token.
//
// One graph serves all families: what differs between them is values in Config.
// A forward pass is a list of steps over a part of the layers and, inside them, a
// part of the heads and of the feed-forward columns; a Shard says which. Between
// its parts a step may need what other shards of the same layers have computed;
// these places are named by Exchange. The whole model is the shard of everything.
package model

import (
	"fmt"
	"math"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Config is the shape of a model and all in which families differ.
type Config struct {
	Family  string // as GGUF's general.architecture
	Layers  int
	Dim     int // of the state that layers hand on
	Heads   int // of queries
	KVHeads int // of keys and values; divides Heads
	HeadDim int
	FFN     int // columns between the two halves of the feed-forward part
	Vocab   int
	Context int // tokens for which the model was made

	Eps        float32 // of the norms
	Rope       Rope
	LocalRope  Rope    // of local layers, where theirs differs
	Local      []bool  // for each layer, whether it sees Window tokens only; nil is no layer
	Window     int     // tokens
	Paired     bool    // RoPE turns neighbours, not halves: Llama's GGUF files
	Tied       bool    // the embedding is the head as well
	GELU       bool    // else SiLU
	NormOffset float32 // added to the weights of norms: Gemma's files outside GGUF

	EmbedScale float32 // of embeddings; 0 is 1
	AttnScale  float32 // of the products of queries and keys
	AttnCap    float32 // of these products; 0 is none
	LogitCap   float32 // 0 is none
}

// Rope says how positions turn queries and keys.
type Rope struct {
	Freq      []float32 // radians for each position, for each pair of numbers
	Magnitude float32
}

// The bounds of what is believed. The largest models in use stay far below.
const (
	maxLayers  = 1 << 10
	maxDim     = 1 << 17
	maxHeads   = 1 << 10
	maxHeadDim = 1 << 10
	maxFFN     = 1 << 19
	maxVocab   = 1 << 21
	maxContext = 1 << 24
)

// families are the architectures of GGUF that the graph computes.
var families = map[string]func(*Config){
	"llama":  func(c *Config) { c.Paired = true },
	"qwen2":  func(*Config) {},
	"qwen3":  func(*Config) {},
	"gemma2": gemma,
	"gemma3": gemma,
}

func gemma(c *Config) {
	c.GELU = true
	c.EmbedScale = float32(math.Sqrt(float64(c.Dim)))
}

// meta reads the keys of one architecture, and remembers what was missing.
type meta struct {
	m       *gguf.Meta
	arch    string
	missing string
}

func (m *meta) int(key string, absent int) int {
	n, ok := m.m.Int(m.arch + "." + key)
	if !ok {
		if list, isList := m.m.Ints(m.arch + "." + key); isList && len(list) > 0 && same(list) {
			n, ok = list[0], true
		}
	}
	switch {
	case ok && n >= 0 && n <= maxContext:
		return int(n)
	case absent < 0 || ok:
		m.missing = m.arch + "." + key
	}
	return absent
}

func (m *meta) float(key string, absent float64) float64 {
	if f, ok := m.m.Float(m.arch + "." + key); ok {
		return f
	}
	return absent
}

func same(list []int64) bool {
	for _, n := range list {
		if n != list[0] {
			return false
		}
	}
	return true
}

// FromGGUF reads the configuration of a GGUF file. It fails with Unsupported for
// families that the graph does not know, and with Invalid.
func FromGGUF(f *gguf.File) (Config, error) {
	const op = "model.FromGGUF"
	arch := f.Architecture()
	adapt := families[arch]
	if adapt == nil {
		return Config{}, sandbox.Errorf(op, sandbox.Unsupported, arch, "the architecture %q is not known", arch).
			WithHint("supported are llama (with mistral and smollm), qwen2, qwen3, gemma2 and gemma3")
	}
	m := &meta{m: &f.Meta, arch: arch}
	c := Config{
		Family: arch, Layers: m.int("block_count", -1), Dim: m.int("embedding_length", -1), FFN: m.int("feed_forward_length", -1),
		Heads: m.int("attention.head_count", -1), Context: m.int("context_length", -1), Window: m.int("attention.sliding_window", 0),
		Eps:     float32(m.float("attention.layer_norm_rms_epsilon", 1e-5)),
		AttnCap: float32(m.float("attn_logit_softcapping", 0)), LogitCap: float32(m.float("final_logit_softcapping", 0)),
	}
	c.KVHeads = m.int("attention.head_count_kv", c.Heads)
	if c.Heads > 0 {
		c.HeadDim = m.int("attention.key_length", c.Dim/c.Heads)
	}
	if v := m.int("attention.value_length", c.HeadDim); m.missing == "" && v != c.HeadDim {
		return Config{}, sandbox.Errorf(op, sandbox.Unsupported, arch, "values of %d numbers beside keys of %d", v, c.HeadDim)
	}
	if m.missing != "" {
		return Config{}, sandbox.Errorf(op, sandbox.Invalid, arch, "%s is missing or out of bounds", m.missing)
	}
	if t := f.Tensor("token_embd.weight"); t != nil {
		c.Vocab = t.Rows()
	}
	c.Tied = f.Tensor("output.weight") == nil
	adapt(&c)
	scaling := scaling{kind: "none", factor: m.float("rope.scaling.factor", m.float("rope.scale_linear", 1)), context: m.int("rope.scaling.original_context_length", c.Context)}
	if kind, ok := f.Meta.String(arch + ".rope.scaling.type"); ok {
		scaling.kind = kind
	} else if scaling.factor != 1 {
		scaling.kind = "linear"
	}
	if err := c.finish(m.int("rope.dimension_count", c.HeadDim), m.float("rope.freq_base", 10_000), scaling); err != nil {
		return Config{}, err
	}
	return c, nil
}

// finish fills in what follows from the rest, and checks all.
func (c *Config) finish(ropeDim int, base float64, s scaling) error {
	const op = "model.Config"
	bad := func(format string, args ...any) error {
		return sandbox.Errorf(op, sandbox.Invalid, c.Family, format, args...)
	}
	for _, f := range []struct {
		name    string
		n, most int
	}{{"layers", c.Layers, maxLayers}, {"dimension", c.Dim, maxDim}, {"heads", c.Heads, maxHeads}, {"key heads", c.KVHeads, maxHeads},
		{"head dimension", c.HeadDim, maxHeadDim}, {"feed-forward columns", c.FFN, maxFFN}, {"vocabulary", c.Vocab, maxVocab}, {"context", c.Context, maxContext}} {
		if f.n < 1 || f.n > f.most {
			return bad("%s: %d is not from 1 to %d", f.name, f.n, f.most)
		}
	}
	switch {
	case c.Heads%c.KVHeads != 0:
		return bad("%d heads cannot share %d", c.Heads, c.KVHeads)
	case c.HeadDim%tensor.Lanes != 0:
		return sandbox.Errorf(op, sandbox.Unsupported, c.Family, "heads of %d numbers, which is no multiple of %d", c.HeadDim, tensor.Lanes)
	case ropeDim < 2 || ropeDim > c.HeadDim || ropeDim%2 != 0:
		return bad("RoPE over %d of %d numbers", ropeDim, c.HeadDim)
	case !(base > 0) || !(c.Eps >= 0) || c.Eps > 1:
		return bad("a RoPE base of %v, a norm's epsilon of %v", base, c.Eps)
	case c.Local != nil && len(c.Local) != c.Layers:
		return bad("%d layers and the kinds of %d", c.Layers, len(c.Local))
	}
	if c.AttnScale == 0 {
		c.AttnScale = float32(1 / math.Sqrt(float64(c.HeadDim)))
	}
	if (c.Family == "gemma2" && c.Layers == 46) || (c.Family == "gemma3" && c.Layers == 62) { // the 27B's are scaled by what a head has of the state
		c.AttnScale = float32(1 / math.Sqrt(float64(c.Dim)/float64(c.Heads)))
	}
	if c.Window > 0 && c.Local == nil {
		c.Local = make([]bool, c.Layers)
		for i := range c.Local {
			switch c.Family {
			case "gemma2":
				c.Local[i] = i%2 == 0
			case "gemma3":
				c.Local[i] = i%6 != 5
			}
		}
	}
	var err error
	if c.Rope, err = s.rope(ropeDim, base); err != nil {
		return err
	}
	c.LocalRope = c.Rope
	if c.Family == "gemma3" {
		c.LocalRope, err = scaling{kind: "none"}.rope(ropeDim, 10_000)
	}
	return err
}

// String says in a few words what the model is.
func (c Config) String() string {
	return fmt.Sprintf("%s, %d layers of %d, %d/%d heads of %d, %d columns, %d tokens, window %d",
		c.Family, c.Layers, c.Dim, c.Heads, c.KVHeads, c.HeadDim, c.FFN, c.Vocab, c.Context)
}
