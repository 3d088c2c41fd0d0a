package openai

import (
	"encoding/json"
	"net/http"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/grammar"
	"github.com/atoll-run/atoll/llm/host"
)

type chatRequest struct {
	settings
	Messages            json.RawMessage   `json:"messages"`
	MaxCompletionTokens *int              `json:"max_completion_tokens"`
	LogProbs            bool              `json:"logprobs"`
	TopLogProbs         *int              `json:"top_logprobs"`
	Format              *responseFormat   `json:"response_format"`
	Tools               []tool            `json:"tools"`
	ToolChoice          toolChoice        `json:"tool_choice"`
	Template            json.RawMessage   `json:"chat_template_kwargs"` // not OpenAI's
	rawTools            []json.RawMessage // as they came, for templates
}

type responseFormat struct {
	Type   string `json:"type"`
	Schema *struct {
		Name   string          `json:"name"`
		Schema json.RawMessage `json:"schema"`
		Strict bool            `json:"strict"`
	} `json:"json_schema"`
}

func (c *chatRequest) usesTools() bool { return len(c.Tools) > 0 && c.ToolChoice.mode != "none" }

func (c *chatRequest) checkChat() error {
	if c.MaxCompletionTokens != nil {
		c.MaxTokens = c.MaxCompletionTokens
	}
	if err := c.check(); err != nil {
		return err
	}
	if top := value(c.TopLogProbs, 0); top < 0 || top > 20 {
		return invalid("top_logprobs", "Invalid 'top_logprobs': expected a number from 0 to 20, but got %d instead.", top)
	} else if top > 0 && !c.LogProbs {
		return invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is enabled.")
	}
	return checkTools(c.Tools, c.ToolChoice)
}

// form makes the grammar of one answer, nil when it is free. Each choice needs its
// own.
func (c *chatRequest) form() (*grammar.Grammar, error) {
	if c.ToolChoice.mode == "required" {
		return callForm(c.Tools, c.ToolChoice)
	}
	if c.Format == nil {
		return nil, nil
	}
	switch c.Format.Type {
	case "text", "":
		return nil, nil
	case "json_object":
		return grammar.JSON()
	case "json_schema":
		if c.Format.Schema == nil || len(c.Format.Schema.Schema) == 0 {
			return nil, invalid("response_format.json_schema", "Missing required parameter: 'response_format.json_schema'.")
		}
		g, err := grammar.Schema(c.Format.Schema.Schema, c.Format.Schema.Strict)
		if err != nil {
			return nil, invalid("response_format", "Invalid schema for response_format '%s': %s", c.Format.Schema.Name, told(err))
		}
		return g, nil
	}
	return nil, invalid("response_format.type", "Invalid value: '%s'. Supported values are: 'json_object', 'json_schema', and 'text'.", c.Format.Type)
}

// chat answers POST /v1/chat/completions.
func (a *api) chat(w http.ResponseWriter, r *http.Request, tenant string) error {
	var c chatRequest
	data, err := body(w, r, &c)
	if err != nil {
		return err
	}
	if err := c.checkChat(); err != nil {
		return err
	}
	if u := a.upstream(r.Context(), c.Model); u != nil {
		return u.pass(w, r, data, c.Model)
	}
	var raw struct{ Tools []json.RawMessage }
	if err := json.Unmarshal(data, &raw); err != nil {
		return jsonError(err)
	}
	c.rawTools = raw.Tools
	m, release, err := a.use(r, c.Model)
	if err != nil {
		return err
	}
	defer release()
	prompt, err := c.prompt(m)
	if err != nil {
		return err
	}
	requests, err := c.requests(m, prompt, tenant)
	if err != nil {
		return err
	}
	out := &chatAnswer{a: a, c: &c, head: newHead("chatcmpl-", "chat.completion", c.Model), choices: make([]chatChoice, len(requests)), sifters: make([]sifter, len(requests))}
	key := a.answerKey(m, &c.settings, "chat", prompt, data)
	if a.recall(key, out) {
		return out.replay(w)
	}
	g, err := generate(r.Context(), m, requests)
	if err != nil {
		return err
	}
	defer g.close()
	out.m = m
	if c.Stream {
		out.Object = "chat.completion.chunk"
		e := newEvents(w)
		err := out.stream(r, g, e)
		a.end(e, w, r, err)
		if err == nil {
			a.remember(key, out)
		}
		return nil
	}
	if err := g.each(r.Context(), out.gather); err != nil {
		return err
	}
	out.Usage = g.usage()
	for i := range out.choices {
		out.choices[i].conclude(&c)
	}
	a.remember(key, out)
	return out.replay(w)
}

// requests are what the engine is asked for, one for each choice.
func (c *chatRequest) requests(m *host.Model, prompt []int32, tenant string) ([]engine.Request, error) {
	window, limit := m.Engine.Window(), value(c.MaxTokens, 0)
	if len(prompt) >= window || len(prompt)+limit > window {
		return nil, tooLong("messages", window, len(prompt), limit)
	}
	seed := newSeed()
	list := make([]engine.Request, value(c.N, 1))
	for i := range list {
		sampling, err := c.sampling(i, seed)
		if err != nil {
			return nil, err
		}
		form, err := c.form()
		if err != nil {
			return nil, err
		}
		sparse, err := c.attention()
		if err != nil {
			return nil, err
		}
		list[i] = engine.Request{Tenant: tenant, Prompt: prompt, Limit: limit, Sampling: sampling, Stop: c.Stop, Likely: -1, Form: form, Sparse: sparse}
		if c.LogProbs {
			list[i].Likely = value(c.TopLogProbs, 0)
		}
	}
	return list, nil
}

// chatAnswer is a chat completion on its way.
type chatAnswer struct {
	head
	Usage usage

	a       *api
	c       *chatRequest
	m       *host.Model
	choices []chatChoice
	sifters []sifter
}

// chatChoice is one answer, whole.
type chatChoice struct {
	Text     string
	Calls    []toolCall
	LogProbs []tokenProb
	Finish   string
}

// conclude separates calls from text.
func (ch *chatChoice) conclude(c *chatRequest) {
	if !c.usesTools() {
		return
	}
	calls, rest := parseCalls(ch.Text, c.Tools)
	for _, call := range calls {
		ch.Calls = append(ch.Calls, toolCall{ID: newHead("call_", "", "").ID, Type: "function", Function: call})
	}
	if len(calls) > 0 {
		ch.Text, ch.Finish = rest, "tool_calls"
	}
}

func (o *chatAnswer) gather(p piece) error {
	ch := &o.choices[p.index]
	ch.Text += p.Text
	if o.c.LogProbs {
		ch.LogProbs = append(ch.LogProbs, probs(o.m, p.Tokens)...)
	}
	if p.Finish != "" {
		ch.Finish = string(p.Finish)
	}
	return nil
}

// replay writes the whole answer, in the way in which it was asked for.
func (o *chatAnswer) replay(w http.ResponseWriter) error {
	if o.c.Stream {
		o.Object = "chat.completion.chunk"
		e := newEvents(w)
		for i := range o.choices {
			ch := &o.choices[i]
			if err := o.delta(e, i, map[string]any{"role": "assistant", "content": ""}, nil, ""); err != nil {
				return nil // the client has gone
			}
			if err := o.last(e, i, ch.Text, ch); err != nil {
				return nil
			}
		}
		_ = o.total(e, o.Usage)
		_ = e.raw([]byte("[DONE]"))
		return nil
	}
	type choice struct {
		Index    int            `json:"index"`
		Message  map[string]any `json:"message"`
		LogProbs *logProbs      `json:"logprobs"`
		Finish   string         `json:"finish_reason"`
	}
	list := make([]choice, len(o.choices))
	for i := range o.choices {
		ch := &o.choices[i]
		msg := map[string]any{"role": "assistant", "content": ch.Text, "refusal": nil}
		if len(ch.Calls) > 0 {
			msg["tool_calls"] = ch.Calls
			if ch.Text == "" {
				msg["content"] = nil
			}
		}
		list[i] = choice{i, msg, o.probs(ch.LogProbs), ch.Finish}
	}
	writeJSON(w, http.StatusOK, struct {
		head
		Choices []choice `json:"choices"`
		Usage   usage    `json:"usage"`
	}{o.head, list, o.Usage})
	return nil
}

func (o *chatAnswer) probs(list []tokenProb) *logProbs {
	if !o.c.LogProbs {
		return nil
	}
	if list == nil {
		list = []tokenProb{}
	}
	return &logProbs{Content: list}
}

// stream sends an answer as it is generated.
func (o *chatAnswer) stream(r *http.Request, g *generation, e *events) error {
	begun := make([]bool, len(o.choices))
	err := g.each(r.Context(), func(p piece) error {
		ch := &o.choices[p.index]
		if !begun[p.index] {
			begun[p.index] = true
			if err := o.delta(e, p.index, map[string]any{"role": "assistant", "content": ""}, nil, ""); err != nil {
				return err
			}
		}
		show, from := p.Text, len(ch.LogProbs)
		if err := o.gather(p); err != nil {
			return err
		}
		if o.c.usesTools() {
			show = o.sifters[p.index].add(p.Text)
		}
		if p.Finish == "" {
			if show == "" && len(ch.LogProbs) == from {
				return nil
			}
			return o.delta(e, p.index, map[string]any{"content": show}, ch.LogProbs[from:], "")
		}
		ch.conclude(o.c)
		if len(ch.Calls) == 0 {
			show += o.sifters[p.index].held
		} else {
			show = ""
		}
		tail := *ch
		tail.LogProbs = ch.LogProbs[from:]
		return o.last(e, p.index, show, &tail)
	})
	if err != nil {
		return err
	}
	o.Usage = g.usage()
	return o.total(e, o.Usage)
}

// last sends the end of a choice.
func (o *chatAnswer) last(e *events, index int, text string, ch *chatChoice) error {
	if text != "" || len(ch.LogProbs) > 0 {
		if err := o.delta(e, index, map[string]any{"content": text}, ch.LogProbs, ""); err != nil {
			return err
		}
	}
	for i, call := range ch.Calls {
		call.Index = &i
		if err := o.delta(e, index, map[string]any{"tool_calls": []toolCall{call}}, nil, ""); err != nil {
			return err
		}
	}
	return o.delta(e, index, map[string]any{}, nil, ch.Finish)
}

// delta sends one chunk.
func (o *chatAnswer) delta(e *events, index int, delta map[string]any, list []tokenProb, finish string) error {
	type choice struct {
		Index    int            `json:"index"`
		Delta    map[string]any `json:"delta"`
		LogProbs *logProbs      `json:"logprobs"`
		Finish   *string        `json:"finish_reason"`
	}
	c := choice{Index: index, Delta: delta}
	if len(list) > 0 {
		c.LogProbs = o.probs(list)
	}
	if finish != "" {
		c.Finish = &finish
	}
	return e.send(struct {
		head
		Choices []choice `json:"choices"`
	}{o.head, []choice{c}})
}

// total sends the usage, where it was asked for.
func (o *chatAnswer) total(e *events, u usage) error {
	if o.c.StreamOptions == nil || !o.c.StreamOptions.IncludeUsage {
		return nil
	}
	return e.send(struct {
		head
		Choices []struct{} `json:"choices"`
		Usage   usage      `json:"usage"`
	}{o.head, []struct{}{}, u})
}
