package openai

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"net/http"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/tensor"
)

// inputs is one or several texts, each as a string or as tokens.
type inputs struct {
	texts  []string
	tokens [][]int32
}

const maxInputs = 2048 // in one request, as OpenAI has it

// UnmarshalJSON implements json.Unmarshaler.
func (in *inputs) UnmarshalJSON(data []byte) error {
	*in = inputs{}
	var one string
	var tokens []int32
	switch {
	case json.Unmarshal(data, &one) == nil:
		in.texts = []string{one}
	case json.Unmarshal(data, &in.texts) == nil:
	case json.Unmarshal(data, &tokens) == nil:
		in.texts, in.tokens = nil, [][]int32{tokens}
	default:
		in.texts = nil
		if json.Unmarshal(data, &in.tokens) != nil {
			return invalid("input", "Invalid input: expected a string, an array of strings, an array of tokens, or an array of token arrays.")
		}
	}
	return nil
}

// encode makes the tokens of all texts.
func (in *inputs) encode(m *host.Model) ([][]int32, error) {
	if n := len(in.texts) + len(in.tokens); n == 0 || n > maxInputs {
		return nil, invalid("input", "Invalid input: expected 1 to %d texts, but got %d instead.", maxInputs, n)
	}
	list := in.tokens
	for _, text := range in.texts {
		tokens, err := m.Tokens.EncodePrompt(text, true)
		if err != nil {
			return nil, invalid("input", "Invalid input: %v", err)
		}
		list = append(list, tokens)
	}
	for _, tokens := range list {
		for _, t := range tokens {
			if t < 0 || int(t) >= m.Tokens.Len() {
				return nil, invalid("input", "Invalid input: there is no token %d.", t)
			}
		}
		if len(tokens) == 0 {
			return nil, invalid("input", "Invalid input: a text is empty.")
		}
	}
	return list, nil
}

type completionRequest struct {
	settings
	Prompt   inputs `json:"prompt"`
	LogProbs *int   `json:"logprobs"`
	Echo     bool   `json:"echo"`
	BestOf   *int   `json:"best_of"`
	Suffix   string `json:"suffix"`
}

type textChoice struct {
	Text     string     `json:"text"`
	Index    int        `json:"index"`
	LogProbs *textProbs `json:"logprobs"`
	Finish   *string    `json:"finish_reason"`
}

type textProbs struct {
	Tokens   []string             `json:"tokens"`
	LogProbs []float32            `json:"token_logprobs"`
	Top      []map[string]float32 `json:"top_logprobs"`
	Offsets  []int                `json:"text_offset"`
}

const defaultCompletion = 16 // tokens, as OpenAI has it

// complete answers POST /v1/completions.
func (a *api) complete(w http.ResponseWriter, r *http.Request, tenant string) error {
	var c completionRequest
	data, err := body(w, r, &c)
	if err != nil {
		return err
	}
	switch err := c.check(); {
	case err != nil:
		return err
	case c.Suffix != "":
		return invalid("suffix", "'suffix' is not supported by this model.")
	case c.BestOf != nil && *c.BestOf != value(c.N, 1):
		return invalid("best_of", "'best_of' is not supported.")
	case value(c.LogProbs, 0) < 0 || value(c.LogProbs, 0) > 20:
		return invalid("logprobs", "Invalid 'logprobs': expected a number from 0 to 20.")
	}
	if u := a.upstream(r.Context(), c.Model); u != nil {
		return u.pass(w, r, data, c.Model)
	}
	m, release, err := a.use(r, c.Model)
	if err != nil {
		return err
	}
	defer release()
	requests, prompts, err := c.requests(m, tenant)
	if err != nil {
		return err
	}
	g, err := generate(r.Context(), m, requests)
	if err != nil {
		return err
	}
	defer g.close()
	h := newHead("cmpl-", "text_completion", c.Model)
	choices := make([]textChoice, len(requests))
	for i := range choices {
		choices[i].Index = i
		if c.Echo {
			choices[i].Text = m.Tokens.Decode(prompts[i])
		}
	}
	add := func(p piece) {
		ch := &choices[p.index]
		if c.LogProbs != nil {
			ch.LogProbs = ch.LogProbs.add(m, p.Tokens, len(ch.Text))
		}
		ch.Text += p.Text
		if p.Finish != "" {
			reason := string(p.Finish)
			ch.Finish = &reason
		}
	}
	if c.Stream {
		e := newEvents(w)
		err := g.each(r.Context(), func(p piece) error {
			add(p)
			ch := choices[p.index]
			choices[p.index] = textChoice{Index: p.index}
			return e.send(textAnswer{head: h, Choices: []textChoice{ch}})
		})
		if err == nil && c.StreamOptions != nil && c.StreamOptions.IncludeUsage {
			u := g.usage()
			err = e.send(textAnswer{head: h, Choices: []textChoice{}, Usage: &u})
		}
		a.end(e, w, r, err)
		return nil
	}
	if err := g.each(r.Context(), func(p piece) error { add(p); return nil }); err != nil {
		return err
	}
	u := g.usage()
	writeJSON(w, http.StatusOK, textAnswer{head: h, Choices: choices, Usage: &u})
	return nil
}

type textAnswer struct {
	head
	Choices []textChoice `json:"choices"`
	Usage   *usage       `json:"usage,omitempty"`
}

// requests are what the engine is asked for: for each prompt as many as there are
// choices.
func (c *completionRequest) requests(m *host.Model, tenant string) (list []engine.Request, prompts [][]int32, err error) {
	all, err := c.Prompt.encode(m)
	if err != nil {
		return nil, nil, err
	}
	if len(all)*value(c.N, 1) > maxChoices {
		return nil, nil, invalid("prompt", "Invalid 'prompt': at most %d choices in one request.", maxChoices)
	}
	window, limit, seed := m.Engine.Window(), value(c.MaxTokens, defaultCompletion), newSeed()
	for _, prompt := range all {
		if len(prompt)+limit > window {
			return nil, nil, tooLong("prompt", window, len(prompt), limit)
		}
		for range value(c.N, 1) {
			sampling, err := c.sampling(len(list), seed)
			if err != nil {
				return nil, nil, err
			}
			sparse, err := c.attention()
			if err != nil {
				return nil, nil, err
			}
			q := engine.Request{Tenant: tenant, Prompt: prompt, Limit: limit, Sampling: sampling, Stop: c.Stop, Likely: -1, Sparse: sparse}
			if c.LogProbs != nil {
				q.Likely = *c.LogProbs
			}
			list, prompts = append(list, q), append(prompts, prompt)
		}
	}
	return list, prompts, nil
}

// add appends tokens whose text begins at offset.
func (t *textProbs) add(m *host.Model, tokens []engine.Token, offset int) *textProbs {
	if t == nil {
		t = &textProbs{Tokens: []string{}, LogProbs: []float32{}, Top: []map[string]float32{}, Offsets: []int{}}
	}
	for _, p := range probs(m, tokens) {
		top := map[string]float32{}
		for _, l := range p.Top {
			top[l.Token] = l.LogProb
		}
		t.Tokens, t.LogProbs, t.Top, t.Offsets = append(t.Tokens, p.Token), append(t.LogProbs, p.LogProb), append(t.Top, top), append(t.Offsets, offset)
		offset += len(p.Token)
	}
	return t
}

type embeddingRequest struct {
	Model      string `json:"model"`
	Input      inputs `json:"input"`
	Format     string `json:"encoding_format"`
	Dimensions *int   `json:"dimensions"`
}

// embed answers POST /v1/embeddings.
func (a *api) embed(w http.ResponseWriter, r *http.Request, tenant string) error {
	var c embeddingRequest
	data, err := body(w, r, &c)
	if err != nil {
		return err
	}
	if c.Model == "" {
		return invalid("model", "you must provide a model parameter")
	}
	if c.Format != "" && c.Format != "float" && c.Format != "base64" {
		return invalid("encoding_format", "Invalid value: '%s'. Supported values are: 'float' and 'base64'.", c.Format)
	}
	if u := a.upstream(r.Context(), c.Model); u != nil {
		return u.pass(w, r, data, c.Model)
	}
	m, release, err := a.use(r, c.Model)
	if err != nil {
		return err
	}
	defer release()
	dim := value(c.Dimensions, m.Weights.Config().Dim)
	if dim < 1 || dim > m.Weights.Config().Dim {
		return invalid("dimensions", "Invalid 'dimensions': expected a number from 1 to %d.", m.Weights.Config().Dim)
	}
	list, err := c.Input.encode(m)
	if err != nil {
		return err
	}
	type object struct {
		Object    string `json:"object"`
		Index     int    `json:"index"`
		Embedding any    `json:"embedding"`
	}
	out, total := make([]object, len(list)), 0
	for i, tokens := range list {
		if len(tokens) >= m.Engine.Window() {
			return tooLong("input", m.Engine.Window(), len(tokens), 0)
		}
		v, err := m.Engine.Embed(r.Context(), tenant, tokens)
		if err != nil {
			return err
		}
		total += len(tokens)
		out[i] = object{"embedding", i, encodeVector(v[:dim], dim < len(v), c.Format == "base64")}
	}
	writeJSON(w, http.StatusOK, map[string]any{"object": "list", "data": out, "model": c.Model,
		"usage": map[string]int{"prompt_tokens": total, "total_tokens": total}})
	return nil
}

// encodeVector writes an embedding; one that was cut is made of length 1 again.
func encodeVector(v []float32, cut, packed bool) any {
	if cut {
		sum := 0.0
		for _, x := range v {
			sum += float64(x) * float64(x)
		}
		tensor.Scale(v, float32(1/math.Max(math.Sqrt(sum), 1e-12)))
	}
	if !packed {
		return v
	}
	b := make([]byte, 0, 4*len(v))
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return base64.StdEncoding.EncodeToString(b)
}
