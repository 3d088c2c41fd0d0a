package hf

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/llm/gguf"
)

// A modelConfig is what counts of a config.json.
type modelConfig struct {
	Architectures []string        `json:"architectures"`
	Text          json.RawMessage `json:"text_config"` // of models that see pictures too
	Layers        int             `json:"num_hidden_layers"`
	Dim           int             `json:"hidden_size"`
	FFN           int             `json:"intermediate_size"`
	Heads         int             `json:"num_attention_heads"`
	KVHeads       int             `json:"num_key_value_heads"`
	HeadDim       int             `json:"head_dim"`
	Vocab         int             `json:"vocab_size"`
	Context       int             `json:"max_position_embeddings"`
	Eps           float64         `json:"rms_norm_eps"`
	Theta         float64         `json:"rope_theta"`
	Scaling       *ropeScaling    `json:"rope_scaling"`
	Parameters    json.RawMessage `json:"rope_parameters"` // newer files: theta and scaling together
	Window        *int            `json:"sliding_window"`
	UseWindow     *bool           `json:"use_sliding_window"`
	Tied          *bool           `json:"tie_word_embeddings"`
	AttnCap       float64         `json:"attn_logit_softcapping"`
	LogitCap      float64         `json:"final_logit_softcapping"`
	Quantisation  *quantisation   `json:"quantization_config"`

	arch string // as GGUF has it
}

// A ropeScaling says how positions beyond the trained window are treated.
type ropeScaling struct {
	Type     string  `json:"rope_type"`
	OldType  string  `json:"type"`
	Theta    float64 `json:"rope_theta"`
	Factor   float64 `json:"factor"`
	Low      float64 `json:"low_freq_factor"`
	High     float64 `json:"high_freq_factor"`
	Original int     `json:"original_max_position_embeddings"`
}

// architectures are those that the engine computes, by the names in config.json.
var architectures = map[string]string{
	"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
	"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Gemma3ForConditionalGeneration": "gemma3",
}

// The bounds of what a config may say.
const (
	maxLayers = 1 << 10
	maxWidth  = 1 << 20
)

// settle fills in what is said elsewhere or follows from the rest, and checks it.
func (c *modelConfig) settle() error {
	if len(c.Architectures) == 0 {
		return errors.New("config.json names no architecture")
	}
	if c.arch = architectures[c.Architectures[0]]; c.arch == "" {
		return fmt.Errorf("%w: the architecture %q", errors.ErrUnsupported, c.Architectures[0])
	}
	if len(c.Text) > 0 {
		if err := json.Unmarshal(c.Text, c); err != nil {
			return fmt.Errorf("config.json, text_config: %w", err)
		}
	}
	if c.Scaling == nil && len(c.Parameters) > 0 {
		var flat ropeScaling
		if err := json.Unmarshal(c.Parameters, &flat); err != nil {
			return fmt.Errorf("config.json, rope_parameters: %w", err)
		}
		if flat.Theta == 0 { // one for each kind of layer
			var kinds struct {
				Full ropeScaling `json:"full_attention"`
			}
			if err := json.Unmarshal(c.Parameters, &kinds); err != nil {
				return fmt.Errorf("config.json, rope_parameters: %w", err)
			}
			flat = kinds.Full
		}
		c.Scaling, c.Theta = &flat, flat.Theta
	}
	if c.KVHeads == 0 {
		c.KVHeads = c.Heads
	}
	if c.arch == "gemma3" { // which its config.json leaves out, since they are the defaults
		c.Heads, c.KVHeads, c.HeadDim = orInt(c.Heads, 8), orInt(c.KVHeads, 4), orInt(c.HeadDim, 256)
		c.Context = orInt(c.Context, 131072)
		c.Theta, c.Eps = orFloat(c.Theta, 1e6), orFloat(c.Eps, 1e-6)
	}
	if c.HeadDim == 0 && c.Heads > 0 {
		c.HeadDim = c.Dim / c.Heads
	}
	c.Theta, c.Eps = orFloat(c.Theta, 10_000), orFloat(c.Eps, 1e-6)
	for what, n := range map[string]int{"num_hidden_layers": c.Layers, "hidden_size": c.Dim, "intermediate_size": c.FFN,
		"num_attention_heads": c.Heads, "num_key_value_heads": c.KVHeads, "head_dim": c.HeadDim, "max_position_embeddings": c.Context} {
		if n < 1 || n > maxWidth && what != "max_position_embeddings" || n > 1<<24 || what == "num_hidden_layers" && n > maxLayers {
			return fmt.Errorf("config.json: %s is %d", what, n)
		}
	}
	if c.HeadDim%2 != 0 {
		return fmt.Errorf("config.json: heads of %d numbers", c.HeadDim)
	}
	if c.Scaling != nil && c.Scaling.Type == "" {
		c.Scaling.Type = c.Scaling.OldType
	}
	return nil
}

func orInt(n, otherwise int) int {
	if n == 0 {
		return otherwise
	}
	return n
}

func orFloat(x, otherwise float64) float64 {
	if x == 0 {
		return otherwise
	}
	return x
}

// store writes the shape of the model as GGUF's metadata.
func (c *modelConfig) store(m *gguf.Meta, name string) error {
	pairs := []struct {
		key   string
		value any
	}{
		{"embedding_length", uint32(c.Dim)}, {"block_count", uint32(c.Layers)}, {"feed_forward_length", uint32(c.FFN)},
		{"context_length", uint32(c.Context)}, {"attention.head_count", uint32(c.Heads)}, {"attention.head_count_kv", uint32(c.KVHeads)},
		{"attention.key_length", uint32(c.HeadDim)}, {"attention.value_length", uint32(c.HeadDim)},
		{"attention.layer_norm_rms_epsilon", float32(c.Eps)}, {"rope.freq_base", float32(c.Theta)}, {"rope.dimension_count", uint32(c.HeadDim)},
	}
	add := func(key string, value any) {
		pairs = append(pairs, struct {
			key   string
			value any
		}{key, value})
	}
	if c.Window != nil && *c.Window > 0 && (c.UseWindow == nil || *c.UseWindow) {
		add("attention.sliding_window", uint32(*c.Window))
	}
	if c.AttnCap > 0 {
		add("attn_logit_softcapping", float32(c.AttnCap))
	}
	if c.LogitCap > 0 {
		add("final_logit_softcapping", float32(c.LogitCap))
	}
	if s := c.Scaling; s != nil {
		switch s.Type {
		case "", "default", "llama3": // Llama 3's becomes the tensor rope_freqs
		case "linear", "yarn":
			add("rope.scaling.type", s.Type)
			add("rope.scaling.factor", float32(s.Factor))
			if s.Original > 0 {
				add("rope.scaling.original_context_length", uint32(s.Original))
			}
		default:
			return fmt.Errorf("%w: RoPE scaling %q", errors.ErrUnsupported, s.Type)
		}
	}
	if err := m.Set(gguf.KeyArchitecture, c.arch); err != nil {
		return err
	}
	if err := m.Set("general.name", name); err != nil {
		return err
	}
	for _, p := range pairs {
		if err := m.Set(c.arch+"."+p.key, p.value); err != nil {
			return err
		}
	}
	return nil
}

// ropeFactors returns by what Llama 3 divides the frequencies of RoPE; nil for
// other models. Slow turns are slowed by the factor, fast ones are left, and those
// between by what is between.
func (c *modelConfig) ropeFactors() []float32 {
	s := c.Scaling
	if s == nil || s.Type != "llama3" || !(s.Factor > 0) || !(s.High > s.Low) || s.Low <= 0 || s.Original <= 0 {
		return nil
	}
	out := make([]float32, c.HeadDim/2)
	for i := range out {
		turn := 2 * math.Pi * math.Pow(c.Theta, float64(2*i)/float64(c.HeadDim)) // tokens
		slow, fast := float64(s.Original)/s.Low, float64(s.Original)/s.High
		switch {
		case turn < fast:
			out[i] = 1
		case turn > slow:
			out[i] = float32(s.Factor)
		default:
			smooth := (float64(s.Original)/turn - s.Low) / (s.High - s.Low)
			out[i] = float32(1 / ((1-smooth)/s.Factor + smooth))
		}
	}
	return out
}
