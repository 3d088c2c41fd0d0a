package openai

import (
	"encoding/json"
	"strings"

	"github.com/atoll-run/atoll/llm/grammar"
)

// tool is a function that the model may call.
type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		Parameters  json.RawMessage `json:"parameters"`
		Strict      bool            `json:"strict"`
	} `json:"function"`
}

// toolChoice is "none", "auto", "required" or one function's name.
type toolChoice struct{ mode, name string }

// UnmarshalJSON implements json.Unmarshaler.
func (c *toolChoice) UnmarshalJSON(data []byte) error {
	var named struct {
		Type     string
		Function struct{ Name string }
	}
	if err := json.Unmarshal(data, &c.mode); err == nil {
		if c.mode != "" && c.mode != "none" && c.mode != "auto" && c.mode != "required" {
			return invalid("tool_choice", "Invalid value: '%s'. Supported values are: 'none', 'auto', and 'required'.", c.mode)
		}
		return nil
	}
	if err := json.Unmarshal(data, &named); err != nil || named.Function.Name == "" {
		return invalid("tool_choice", "Invalid type for 'tool_choice': expected one of 'none', 'auto', 'required', or an object with a function's name.")
	}
	c.mode, c.name = "required", named.Function.Name
	return nil
}

// toolCall is a call as messages have it. Index is only in streams.
type toolCall struct {
	Index    *int         `json:"index,omitempty"`
	ID       string       `json:"id"`
	Type     string       `json:"type"`
	Function functionCall `json:"function"`
}

type functionCall struct {
	Name      string `json:"name"`
	Arguments string `json:"arguments"`
}

func checkTools(tools []tool, choice toolChoice) error {
	found := choice.name == ""
	for _, t := range tools {
		if t.Type != "function" || t.Function.Name == "" {
			return invalid("tools", "Invalid 'tools': each needs the type 'function' and a function with a name.")
		}
		found = found || t.Function.Name == choice.name
	}
	if len(tools) == 0 && choice.mode == "required" {
		return invalid("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
	}
	if !found {
		return invalid("tool_choice", "Tool choice '%s' not found in 'tools' parameter.", choice.name)
	}
	return nil
}

// callForm is the form of an answer that must be a call.
func callForm(tools []tool, choice toolChoice) (*grammar.Grammar, error) {
	var forms []any
	for _, t := range tools {
		if choice.name != "" && t.Function.Name != choice.name {
			continue
		}
		parameters := any(t.Function.Parameters)
		if len(t.Function.Parameters) == 0 {
			parameters = map[string]any{"type": "object"}
		}
		// Properties are written by hand, since their order is that of the answer.
		name, err1 := json.Marshal(t.Function.Name)
		schema, err2 := json.Marshal(parameters)
		if err1 != nil || err2 != nil {
			return nil, invalid("tools", "Invalid schema for function '%s'.", t.Function.Name)
		}
		forms = append(forms, json.RawMessage(`{"type":"object","properties":{"name":{"const":`+string(name)+`},"arguments":`+string(schema)+
			`},"required":["name","arguments"],"additionalProperties":false}`))
	}
	schema, err := json.Marshal(map[string]any{"anyOf": forms})
	if err != nil {
		return nil, invalid("tools", "Invalid 'tools': %v", err)
	}
	g, err := grammar.Schema(schema, false)
	if err != nil {
		return nil, invalid("tools", "Invalid schema for a function: %s", told(err))
	}
	return g, nil
}

// The marks between which models write calls. Where a template does not say how
// tools are called, ours does, with the same ones.
const (
	callBegin = "<tool_call>"
	callEnd   = "</tool_call>"
)

// explain tells a model, whose template has no words for tools, what it may call.
func explain(tools json.RawMessage) string {
	return "You may call functions to answer. To call one, write only\n" + callBegin + "\n{\"name\": NAME, \"arguments\": OBJECT}\n" + callEnd +
		"\nand nothing else; the result is given to you. The functions, as JSON:\n" + string(tools)
}

// parseCalls finds the calls in an answer, and what is left of it.
func parseCalls(text string, tools []tool) (calls []functionCall, rest string) {
	one := func(data string) bool {
		var call struct {
			Name       string
			Arguments  json.RawMessage
			Parameters json.RawMessage // as Llama 3 writes it
		}
		if json.Unmarshal([]byte(data), &call) != nil {
			return false
		}
		if call.Arguments == nil {
			call.Arguments = call.Parameters
		}
		for _, t := range tools {
			if t.Function.Name == call.Name {
				arguments := string(call.Arguments)
				var quoted string
				if json.Unmarshal(call.Arguments, &quoted) == nil { // JSON inside a string
					arguments = quoted
				}
				if arguments == "" {
					arguments = "{}"
				}
				calls = append(calls, functionCall{call.Name, arguments})
				return true
			}
		}
		return false
	}
	var kept strings.Builder
	for {
		before, after, found := strings.Cut(text, callBegin)
		kept.WriteString(before)
		if !found {
			break
		}
		inner, next, _ := strings.Cut(after, callEnd)
		if !one(inner) {
			kept.WriteString(callBegin + inner)
		}
		text = next
	}
	rest = kept.String()
	if len(calls) == 0 && one(strings.TrimSpace(rest)) {
		rest = ""
	}
	if len(calls) > 0 {
		rest = strings.TrimSpace(rest)
	}
	return calls, rest
}

// sifter lets the text of a streamed answer through until it may be a call.
type sifter struct {
	held  string
	begun bool // text has been let through
}

// add returns what can be shown now.
func (s *sifter) add(text string) string {
	s.held += text
	if !s.begun && strings.HasPrefix(strings.TrimSpace(s.held), "{") {
		return "" // perhaps a call without marks
	}
	n := len(s.held)
	if i := strings.Index(s.held, callBegin); i >= 0 {
		n = i
	} else {
		for k := min(len(callBegin)-1, len(s.held)); k > 0; k-- {
			if strings.HasSuffix(s.held, callBegin[:k]) {
				n -= k
				break
			}
		}
	}
	show := s.held[:n]
	if !s.begun && strings.TrimSpace(show) == "" {
		return ""
	}
	s.begun, s.held = true, s.held[n:]
	return show
}
