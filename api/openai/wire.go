package openai

import (
	"encoding/json"
	"math"
	"strconv"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/tensor"
)

// settings are the parameters that chat and text completions share. Pointers tell
// what was left out.
type settings struct {
	Model             string             `json:"model"`
	MaxTokens         *int               `json:"max_tokens"`
	Temperature       *float32           `json:"temperature"`
	TopP              *float32           `json:"top_p"`
	N                 *int               `json:"n"`
	Stop              texts              `json:"stop"`
	Stream            bool               `json:"stream"`
	StreamOptions     *streamOptions     `json:"stream_options"`
	FrequencyPenalty  float32            `json:"frequency_penalty"`
	PresencePenalty   float32            `json:"presence_penalty"`
	LogitBias         map[string]float32 `json:"logit_bias"`
	Seed              *int64             `json:"seed"`
	TopK              int                `json:"top_k"`              // not OpenAI's, but widely understood
	MinP              float32            `json:"min_p"`              // as well
	RepetitionPenalty float32            `json:"repetition_penalty"` // as well
	Attention         string             `json:"attention"`          // ours: see engine.ParseAttention
}

type streamOptions struct {
	IncludeUsage bool `json:"include_usage"`
}

// texts is a string or a list of strings.
type texts []string

// UnmarshalJSON implements json.Unmarshaler.
func (t *texts) UnmarshalJSON(data []byte) error {
	var one *string
	if err := json.Unmarshal(data, &one); err == nil {
		*t = nil
		if one != nil {
			*t = texts{*one}
		}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(t))
}

const maxStops = 16 // stop strings; OpenAI has 4

// check refuses what is out of bounds, in OpenAI's words.
func (s *settings) check() error {
	between := func(param string, v, low, high float32) error {
		if !(v >= low && v <= high) {
			return invalid(param, "Invalid '%s': expected a number from %v to %v, but got %v instead.", param, low, high, v)
		}
		return nil
	}
	if s.Model == "" {
		return invalid("model", "you must provide a model parameter")
	}
	if s.MaxTokens != nil && *s.MaxTokens < 1 {
		return invalid("max_tokens", "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got %d instead.", *s.MaxTokens)
	}
	if s.N != nil && (*s.N < 1 || *s.N > maxChoices) {
		return invalid("n", "Invalid 'n': expected a number from 1 to %d, but got %d instead.", maxChoices, *s.N)
	}
	if len(s.Stop) > maxStops {
		return invalid("stop", "Invalid 'stop': at most %d strings.", maxStops)
	}
	if s.StreamOptions != nil && !s.Stream {
		return invalid("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
	}
	if _, err := s.attention(); err != nil {
		return invalid("attention", "Invalid 'attention': expected full, window, window:TOKENS, sparse or sparse:PAGES.")
	}
	for _, err := range []error{
		between("temperature", value(s.Temperature, 1), 0, 2), between("top_p", value(s.TopP, 1), 0, 1), between("min_p", s.MinP, 0, 1),
		between("frequency_penalty", s.FrequencyPenalty, -2, 2), between("presence_penalty", s.PresencePenalty, -2, 2),
		between("top_k", float32(s.TopK), 0, math.MaxInt32), between("repetition_penalty", s.RepetitionPenalty, 0, 10),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

// attention is what tokens attend to; nil is as the server's settings say.
func (s *settings) attention() (*tensor.Sparse, error) {
	if s.Attention == "" {
		return nil, nil
	}
	sparse, err := engine.ParseAttention(s.Attention)
	return &sparse, err
}

func value[T any](p *T, absent T) T {
	if p == nil {
		return absent
	}
	return *p
}

// sampling translates for choice number i; seed is used where none was given.
func (s *settings) sampling(i int, seed uint64) (engine.Sampling, error) {
	out := engine.Sampling{
		Temperature: value(s.Temperature, 1), TopK: s.TopK, TopP: value(s.TopP, 1), MinP: s.MinP,
		Repetition: s.RepetitionPenalty, Frequency: s.FrequencyPenalty, Presence: s.PresencePenalty, Seed: seed,
	}
	if s.TopP != nil && *s.TopP == 0 {
		out.TopK = 1 // only the likeliest
	}
	if s.Seed != nil {
		out.Seed = uint64(*s.Seed)
	}
	out.Seed += uint64(i) * 0x9e3779b97f4a7c15
	if len(s.LogitBias) > 0 {
		out.Bias = make(map[int32]float32, len(s.LogitBias))
		for key, bias := range s.LogitBias {
			token, err := strconv.ParseInt(key, 10, 32)
			if err != nil || !(bias >= -100 && bias <= 100) {
				return out, invalid("logit_bias", "Invalid 'logit_bias': tokens with numbers from -100 to 100.")
			}
			out.Bias[int32(token)] = bias
		}
	}
	return out, nil
}

// repeatable reports whether the same request gives the same answer.
func (s *settings) repeatable() bool { return s.Seed != nil || value(s.Temperature, 1) == 0 }

// usage counts tokens.
type usage struct {
	Prompt     int            `json:"prompt_tokens"`
	Completion int            `json:"completion_tokens"`
	Total      int            `json:"total_tokens"`
	Details    *promptDetails `json:"prompt_tokens_details,omitempty"`
}

type promptDetails struct {
	Cached int `json:"cached_tokens"`
}

// add counts one choice more. The prompt counts once.
func (u *usage) add(e engine.Usage) {
	if u.Details == nil {
		u.Prompt, u.Details = e.Prompt, &promptDetails{e.Cached}
	}
	u.Completion += e.Answer
	u.Total = u.Prompt + u.Completion
}

// logProbs is the probabilities of a chat completion's tokens.
type logProbs struct {
	Content []tokenProb `json:"content"`
	Refusal any         `json:"refusal"` // always null
}

type tokenProb struct {
	topProb
	Top []topProb `json:"top_logprobs"`
}

type topProb struct {
	Token   string  `json:"token"`
	LogProb float32 `json:"logprob"`
	Bytes   []int   `json:"bytes"`
}
