package chat_test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/llm/chat"
	"github.com/atoll-run/atoll/sandbox"
)

// An outcome is what Jinja made of a template: a text or an error.
type outcome struct {
	Text  *string `json:"text"`
	Error string  `json:"error"`
}

type reference struct {
	Conversations map[string]json.RawMessage `json:"conversations"`
	Tools         json.RawMessage            `json:"tools"`
	Templates     map[string]string          `json:"templates"`
	Cases         []struct {
		Template     string          `json:"template"`
		Conversation string          `json:"conversation"`
		Tools        bool            `json:"tools"`
		Answer       bool            `json:"answer"`
		More         json.RawMessage `json:"more"`
		outcome
	} `json:"cases"`
	Snippets []struct {
		Template string `json:"template"`
		outcome
	} `json:"snippets"`
}

func load(t testing.TB) reference {
	t.Helper()
	var r reference
	b, err := os.ReadFile("testdata/reference.json")
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// now is what the reference was told that it is.
var now = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)

func render(source string, c chat.Conversation) (string, error) {
	c.BOS, c.EOS, c.Now = "<s>", "</s>", now
	t, err := chat.Parse(source)
	if err != nil {
		return "", err
	}
	return t.Render(c)
}

func check(t *testing.T, name string, got string, err error, want outcome) {
	t.Helper()
	switch {
	case want.Text == nil && err == nil:
		t.Errorf("%s: %q, want the error %q", name, got, want.Error)
	case want.Text != nil && err != nil:
		t.Errorf("%s: %v, want %q", name, err, *want.Text)
	case want.Text != nil && got != *want.Text:
		t.Errorf("%s:\n got %q\nwant %q", name, got, *want.Text)
	case err != nil && !sandbox.Is(err, sandbox.Invalid):
		t.Errorf("%s: %v is not Invalid", name, err)
	}
}

// conformance: L1
func TestPromptsAreThoseOfTheReference(t *testing.T) {
	ref := load(t)
	for _, c := range ref.Cases {
		conversation := chat.Conversation{Messages: ref.Conversations[c.Conversation], Answer: c.Answer, More: c.More}
		if c.Tools {
			conversation.Tools = ref.Tools
		}
		got, err := render(ref.Templates[c.Template], conversation)
		check(t, c.Template+" "+c.Conversation, got, err, c.outcome)
	}
}

func TestTheLanguageIsJinja(t *testing.T) {
	for _, s := range load(t).Snippets {
		got, err := render(s.Template, chat.Conversation{Messages: []byte("[]")})
		check(t, s.Template, got, err, s.outcome)
	}
}

func TestARefusalOfTheTemplateIsTold(t *testing.T) {
	_, err := render("{{ raise_exception('Roles must alternate') }}", chat.Conversation{Messages: []byte("[]")})
	if err == nil || !strings.Contains(err.Error(), "Roles must alternate") {
		t.Error(err)
	}
}

func TestMessagesAsTheAPIHasThemAreSettled(t *testing.T) {
	const messages = `[
		{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
		{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"z\":1,\"a\":2}"}}]}]`
	const template = `{% for m in messages %}[{{ m.content }}]{% for c in m.tool_calls or [] %}{{ c.function.arguments.z }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}`
	got, err := render(template, chat.Conversation{Messages: []byte(messages)})
	if want := `[ab][]1{"z": 1, "a": 2}`; err != nil || got != want {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

func TestATemplateCannotHarm(t *testing.T) {
	for name, source := range map[string]string{
		"endless loop":    "{% for a in range(1000000) %}{% for b in range(1000000) %}{% endfor %}{% endfor %}",
		"endless macros":  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
		"doubling text":   "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
		"doubling lists":  "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
		"doubling JSON":   "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
		"long text":       "{{ 'x' * 1000000000000 }}",
		"long range":      "{{ range(1000000000000) | length }}",
		"nested brackets": "{{ " + strings.Repeat("(", 100000) + "1" + strings.Repeat(")", 100000) + " }}",
		"nested lists":    "{{ " + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + " }}",
		"nested ifs":      strings.Repeat("{% if true %}", 10000) + strings.Repeat("{% endif %}", 10000),
		"many signs":      "{{ " + strings.Repeat("-", 100000) + "1 }}",
		"many nots":       "{{ " + strings.Repeat("not ", 100000) + "1 }}",
		"too long":        strings.Repeat(" ", 1<<20+1),
		"include":         "{% include '/etc/passwd' %}",
		"import":          "{% import '/etc/passwd' as p %}",
		"attributes":      "{{ ''.__class__.__mro__ }}",
		"changes a list":  "{{ messages.append(1) }}",
		"unfinished":      "{% if true %}",
		"unfinished tag":  "{{ 1",
		"unfinished text": "{{ 'a",
		"unknown filter":  "{{ 1 | shell }}",
		"stray end":       "{% endif %}",
		"stray break":     "{% break %}",
	} {
		if got, err := render(source, chat.Conversation{Messages: []byte("[]")}); err == nil {
			t.Errorf("%s: no error, but %d bytes", name, len(got))
		}
	}
}

func TestHostileConversationsAreRefused(t *testing.T) {
	for name, c := range map[string]chat.Conversation{
		"no messages":    {},
		"not an array":   {Messages: []byte("{}")},
		"not objects":    {Messages: []byte("[1]")},
		"broken":         {Messages: []byte(`[{"role":`)},
		"more after":     {Messages: []byte("[] []")},
		"nested":         {Messages: []byte(strings.Repeat("[", 10000) + strings.Repeat("]", 10000))},
		"broken tools":   {Messages: []byte("[]"), Tools: []byte("[")},
		"more is a list": {Messages: []byte("[]"), More: []byte("[]")},
	} {
		if _, err := render("x", c); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRender: a template fails or gives a prompt; it never does more.
func FuzzRender(f *testing.F) {
	ref := load(f)
	for _, s := range ref.Snippets {
		f.Add(s.Template)
	}
	for _, s := range ref.Templates {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, source string) {
		_, _ = render(source, chat.Conversation{Messages: ref.Conversations["tools"], Tools: ref.Tools})
	})
}

func BenchmarkParse(b *testing.B) {
	ref := load(b)
	for b.Loop() {
		if _, err := chat.Parse(ref.Templates["qwen3"]); err != nil {
			b.Fatal(err)
		}
	}
}
