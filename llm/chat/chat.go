// Package chat makes a prompt of a conversation, by the template that comes with a
// model.
//
// Templates are Jinja, written for Python and foreign to us, so this package has
// its own evaluator of the part of Jinja that templates are made of: dictionaries
// keep their order and values print as in Python, which the exact prompt depends on,
// and steps, depth and memory are bounded, so that a template can at worst fail.
package chat

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ncruces/go-strftime"

	"github.com/atoll-run/atoll/sandbox"
)

// The bounds of a template and of what it does. Templates in use stay below 32 KB
// and some thousand steps.
const (
	maxSource = 1 << 20 // bytes
	maxSteps  = 1 << 20 // expressions evaluated
	maxMemory = 1 << 26 // bytes of text and lists made, all together
	maxTime   = 10 * time.Second
	maxDepth  = 200 // of expressions in each other, and of macros that call each other
)

// A Template is a chat template that was read. It does not change and can be used
// from several goroutines.
type Template struct {
	body []statement
}

// Parse reads a template. Errors are Invalid, or Unsupported for what Jinja has and
// this package does not.
func Parse(source string) (*Template, error) {
	if len(source) > maxSource {
		return nil, sandbox.Errorf("chat.Parse", sandbox.Invalid, "", "a template of %d bytes is too long", len(source))
	}
	body, err := parseTemplate(source)
	if err != nil {
		kind := sandbox.Invalid
		if errors.Is(err, errors.ErrUnsupported) {
			kind = sandbox.Unsupported
		}
		return nil, sandbox.E("chat.Parse", kind, "", err)
	}
	return &Template{body: body}, nil
}

// A Conversation is what a prompt is made of. Messages and Tools are JSON as
// OpenAI's API has it.
type Conversation struct {
	Messages json.RawMessage // an array of messages
	Tools    json.RawMessage // an array of tools; may be nil
	Answer   bool            // end with the beginning of the model's answer
	BOS, EOS string          // as the vocabulary writes them
	Now      time.Time       // what templates are told that it is
	// More is what the caller hands to the template by name, a JSON object, e.g.
	// {"enable_thinking": false}; may be nil.
	More json.RawMessage
}

// Render returns the prompt. Errors are Invalid: the conversation is one that the
// template refuses, or the template fails.
func (t *Template) Render(c Conversation) (string, error) {
	const op = "chat.Render"
	f, err := c.frame()
	if err != nil {
		return "", sandbox.E(op, sandbox.Invalid, "", err)
	}
	err = f.run(t.body)
	var loop loopControl
	if errors.As(err, &loop) {
		err = errors.New("break or continue outside of a loop")
	}
	if err != nil {
		return "", sandbox.E(op, sandbox.Invalid, "", fmt.Errorf("the model's chat template: %w", err))
	}
	return f.out.String(), nil
}

// frame puts what a template may refer to into its outermost scope.
func (c *Conversation) frame() (*frame, error) {
	messages, err := decodeJSON(c.Messages)
	if err != nil {
		return nil, fmt.Errorf("messages: %w", err)
	}
	list, ok := messages.(*list)
	if !ok {
		return nil, errors.New("messages are not an array")
	}
	for i, m := range list.items {
		d, ok := m.(*dict)
		if !ok {
			return nil, fmt.Errorf("message %d is not an object", i)
		}
		settle(d)
	}
	vars := map[string]value{
		"messages": list, "bos_token": c.BOS, "eos_token": c.EOS, "add_generation_prompt": c.Answer,
		"raise_exception": function(func(_ *frame, a *arguments) (value, error) {
			return nil, errors.New(toString(a.at(0, "message")))
		}),
		"strftime_now": function(func(_ *frame, a *arguments) (value, error) {
			format, ok := a.at(0, "format").(string)
			if !ok || len(format) > 1024 {
				return nil, errors.New("strftime_now wants a format")
			}
			return strftime.Format(format, c.Now), nil
		}),
		"namespace": function(newNamespace), "range": function(newRange), "dict": function(newDict),
	}
	tools, err := decodeJSON(c.Tools)
	if err != nil {
		return nil, fmt.Errorf("tools: %w", err)
	}
	vars["tools"] = tools // None when there are none, as templates expect
	more, err := decodeJSON(c.More)
	if err != nil {
		return nil, fmt.Errorf("the template's own parameters: %w", err)
	}
	if d, ok := more.(*dict); ok {
		for _, k := range d.keys {
			if _, taken := vars[k]; !taken {
				vars[k] = d.values[k]
			}
		}
	} else if more != nil {
		return nil, errors.New("the template's own parameters are not an object")
	}
	return &frame{scope: &scope{vars: vars}, out: &strings.Builder{}, filters: filters,
		budget: &budget{until: time.Now().Add(maxTime)}}, nil
}

// settle brings a message into the form that templates are written for: text
// instead of parts of text, and the arguments of tool calls as objects.
func settle(m *dict) {
	switch content := m.values["content"].(type) {
	case nil:
		m.set("content", "")
	case *list:
		if text, ok := joinParts(content); ok {
			m.set("content", text)
		}
	}
	calls, _ := m.values["tool_calls"].(*list)
	if calls == nil {
		return
	}
	for _, c := range calls.items {
		call, _ := c.(*dict)
		if call == nil {
			continue
		}
		fn, _ := call.values["function"].(*dict)
		if fn == nil {
			continue
		}
		if text, ok := fn.values["arguments"].(string); ok {
			if v, err := decodeJSON([]byte(text)); err == nil {
				if object, ok := v.(*dict); ok {
					fn.set("arguments", object)
				}
			}
		}
	}
}

// joinParts returns the text of a content that consists of text parts alone.
func joinParts(parts *list) (string, bool) {
	var b strings.Builder
	for _, p := range parts.items {
		d, _ := p.(*dict)
		if d == nil || d.values["type"] != "text" {
			return "", false
		}
		text, ok := d.values["text"].(string)
		if !ok {
			return "", false
		}
		b.WriteString(text)
	}
	return b.String(), true
}
