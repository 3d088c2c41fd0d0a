package openai

import (
	"encoding/json"
	"time"

	"github.com/atoll-run/atoll/llm/chat"
	"github.com/atoll-run/atoll/llm/host"
)

// message is as much of a message as must be understood here; templates get the
// whole of it.
type message struct {
	Role       string          `json:"role"`
	Content    json.RawMessage `json:"content,omitempty"`
	ToolCalls  []toolCall      `json:"tool_calls,omitempty"`
	ToolCallID string          `json:"tool_call_id,omitempty"`
}

const maxMessages = 1 << 14

// prompt makes the tokens of a conversation.
func (c *chatRequest) prompt(m *host.Model) ([]int32, error) {
	if m.Template == nil {
		if m.Broken != nil {
			return nil, invalid("messages", "The model's chat template cannot be used: %s. Use /v1/completions.", told(m.Broken))
		}
		return nil, invalid("messages", "This model has no chat template. Use /v1/completions.")
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(c.Messages, &raw); err != nil || len(raw) == 0 || len(raw) > maxMessages {
		return nil, invalid("messages", "Invalid 'messages': expected an array of 1 to %d messages.", maxMessages)
	}
	list := make([]message, len(raw))
	for i := range raw {
		if err := json.Unmarshal(raw[i], &list[i]); err != nil {
			return nil, invalid("messages", "Invalid 'messages[%d]': %v", i, err)
		}
		switch list[i].Role {
		case "developer": // OpenAI's new word for it
			list[i].Role = "system"
			raw[i] = renamed(raw[i])
		case "system", "user", "assistant", "tool", "function":
		default:
			return nil, invalid("messages", "Invalid value: '%s'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and 'developer'.", list[i].Role)
		}
		if err := checkContent(list[i].Content); err != nil {
			return nil, err
		}
	}
	conv := chat.Conversation{Answer: true, BOS: m.Tokens.Name(m.Tokens.BOS()), EOS: m.Tokens.Name(m.Tokens.EOS()), Now: time.Now(), More: c.Template}
	if c.usesTools() {
		tools, err := json.Marshal(c.rawTools)
		if err != nil {
			return nil, err
		}
		if m.KnowsTools {
			conv.Tools = tools
		} else {
			raw = plain(list, explain(tools))
		}
	} else if !m.KnowsTools {
		raw = plainWhereNeeded(list, raw)
	}
	var err error
	if conv.Messages, err = json.Marshal(raw); err != nil {
		return nil, err
	}
	text, err := m.Template.Render(conv)
	if err != nil {
		return nil, err
	}
	return m.Tokens.EncodePrompt(text, true)
}

// checkContent refuses what is not text.
func checkContent(content json.RawMessage) error {
	var parts []struct{ Type string }
	if len(content) == 0 || content[0] != '[' {
		return nil
	}
	if err := json.Unmarshal(content, &parts); err != nil {
		return invalid("messages", "Invalid content: %v", err)
	}
	for _, p := range parts {
		if p.Type != "text" && p.Type != "refusal" {
			return invalid("messages", "This model reads text only, and a message has content of type '%s'.", p.Type)
		}
	}
	return nil
}

// renamed is a message whose role becomes system.
func renamed(raw json.RawMessage) json.RawMessage {
	var m map[string]json.RawMessage
	if json.Unmarshal(raw, &m) != nil {
		return raw
	}
	m["role"] = json.RawMessage(`"system"`)
	out, err := json.Marshal(m)
	if err != nil {
		return raw
	}
	return out
}

// text is a message's content, its parts joined.
func (m *message) text() string {
	var s string
	if json.Unmarshal(m.Content, &s) == nil {
		return s
	}
	var parts []struct{ Text string }
	_ = json.Unmarshal(m.Content, &parts) // checked before
	for _, p := range parts {
		s += p.Text
	}
	return s
}

// plain writes a conversation with tools in the roles that every template knows.
func plain(list []message, explanation string) []json.RawMessage {
	var out []json.RawMessage
	put := func(role, content string) {
		data, err := json.Marshal(map[string]string{"role": role, "content": content})
		if err == nil { // strings always can be marshalled
			out = append(out, data)
		}
	}
	for i, m := range list {
		content := m.text()
		if i == 0 && explanation != "" {
			if m.Role == "system" {
				put("system", content+"\n\n"+explanation)
				continue
			}
			put("system", explanation)
		}
		switch m.Role {
		case "tool", "function":
			put("user", "<tool_response>\n"+content+"\n</tool_response>")
		case "assistant":
			for _, call := range m.ToolCalls {
				arguments := json.RawMessage(call.Function.Arguments)
				if !json.Valid(arguments) {
					arguments = json.RawMessage("{}")
				}
				data, err := json.Marshal(map[string]any{"name": call.Function.Name, "arguments": arguments})
				if err == nil { // what was parsed can be marshalled
					content += "\n" + callBegin + "\n" + string(data) + "\n" + callEnd
				}
			}
			put("assistant", content)
		default:
			put(m.Role, content)
		}
	}
	return out
}

// plainWhereNeeded is plain for a conversation in which tools were called before.
func plainWhereNeeded(list []message, raw []json.RawMessage) []json.RawMessage {
	for _, m := range list {
		if len(m.ToolCalls) > 0 || m.Role == "tool" || m.Role == "function" {
			return plain(list, "")
		}
	}
	return raw
}
