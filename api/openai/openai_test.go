package openai

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/sandbox"
)

// serve is the API over an empty store.
func serve(t *testing.T, c Config) string {
	t.Helper()
	h, err := host.New(host.Config{Store: host.OpenStore(t.TempDir()), Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	c.Host = h
	srv := httptest.NewServer(New(c))
	t.Cleanup(func() {
		srv.Close()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return srv.URL
}

func do(t *testing.T, method, url, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(data)
}

// conformance: L1
func TestErrorsHaveOpenAIsShape(t *testing.T) {
	url := serve(t, Config{})
	for _, c := range []struct {
		method, path, body string
		status             int
		typ, code, param   string
	}{
		{"POST", "/v1/chat/completions", `{`, 400, "invalid_request_error", "", ""},
		{"POST", "/v1/chat/completions", `{}`, 400, "invalid_request_error", "", "model"},
		{"POST", "/v1/chat/completions", `{"model":"x","temperature":3}`, 400, "invalid_request_error", "", "temperature"},
		{"POST", "/v1/chat/completions", `{"model":"x","temperature":"hot"}`, 400, "invalid_request_error", "", "temperature"},
		{"POST", "/v1/chat/completions", `{"model":"x","n":99}`, 400, "invalid_request_error", "", "n"},
		{"POST", "/v1/chat/completions", `{"model":"x","tool_choice":"maybe"}`, 400, "invalid_request_error", "", "tool_choice"},
		{"POST", "/v1/chat/completions", `{"model":"x","messages":[{"role":"user","content":"hi"}]}`, 404, "invalid_request_error", "model_not_found", "model"},
		{"POST", "/v1/completions", `{"model":"x","prompt":"a"}`, 404, "invalid_request_error", "model_not_found", "model"},
		{"POST", "/v1/completions", `{"model":"x","prompt":{}}`, 400, "invalid_request_error", "", "input"},
		{"POST", "/v1/embeddings", `{"model":"x","input":"a","encoding_format":"morse"}`, 400, "invalid_request_error", "", "encoding_format"},
		{"GET", "/v1/models/x", ``, 404, "invalid_request_error", "model_not_found", "model"},
		{"GET", "/v1/teapots", ``, 404, "invalid_request_error", "unknown_url", ""},
	} {
		status, body := do(t, c.method, url+c.path, c.body)
		var e struct {
			Error struct {
				Message     string
				Type        string
				Code, Param *string
			}
		}
		if err := json.Unmarshal([]byte(body), &e); err != nil {
			t.Errorf("%s %s: %v", c.path, body, err)
			continue
		}
		if status != c.status || e.Error.Type != c.typ || value(e.Error.Code, "") != c.code || value(e.Error.Param, "") != c.param || e.Error.Message == "" {
			t.Errorf("%s %s: %d %s", c.path, c.body, status, body)
		}
	}
	if _, body := do(t, "POST", url+"/v1/chat/completions", `{"model":"x","messages":[{"role":"user","content":"hi"}]}`); !strings.Contains(body, "atoll model import") {
		t.Errorf("nothing helps: %s", body)
	}
}

func TestKeysAreChecked(t *testing.T) {
	url := serve(t, Config{Verify: func(_ context.Context, secret string) (string, error) {
		if secret != "good" {
			return "", sandbox.Errorf("test", sandbox.Denied, "", "no")
		}
		return "team", nil
	}})
	for header, want := range map[string]int{"": 401, "Bearer bad": 401, "Bearer good": 200} {
		if status, body := do(t, "GET", url+"/v1/models", "", "Authorization", header); status != want {
			t.Errorf("%q: %d %s", header, status, body)
		}
	}
}

// conformance: L1
func TestModelsThatAreElsewhereAreAskedThere(t *testing.T) {
	var last map[string]any
	far := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer far-key" {
			http.Error(w, "whose key is this", http.StatusUnauthorized)
			return
		}
		if r.URL.Path == "/v1/models" {
			fmt.Fprint(w, `{"data":[{"id":"big"}]}`)
			return
		}
		last = nil
		if err := json.NewDecoder(r.Body).Decode(&last); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"x\":1}\n\ndata: [DONE]\n\n")
	}))
	defer far.Close()
	url := serve(t, Config{Upstreams: []Upstream{{Name: "gpu", URL: far.URL + "/v1", Key: "far-key"}, {Name: "dead", URL: "http://127.0.0.1:1/v1"}}})
	if _, body := do(t, "GET", url+"/v1/models", ""); !strings.Contains(body, `"gpu/big"`) {
		t.Errorf("%s", body)
	}
	for _, model := range []string{"gpu/big", "big", "gpu/unlisted"} {
		status, body := do(t, "POST", url+"/v1/chat/completions", `{"model":"`+model+`","messages":[],"unknown":5}`)
		if status != 200 || !strings.HasSuffix(body, "[DONE]\n\n") || last["model"] != strings.TrimPrefix(model, "gpu/") || last["unknown"] != 5.0 {
			t.Errorf("%s: %d %s, the other server got %v", model, status, body, last)
		}
	}
	if status, body := do(t, "POST", url+"/v1/chat/completions", `{"model":"dead/x","messages":[]}`); status != 503 || !strings.Contains(body, `"error"`) {
		t.Errorf("%d %s", status, body)
	}
}

func someTools(t testing.TB) []tool {
	t.Helper()
	var list []tool
	if err := json.Unmarshal([]byte(`[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}},{"type":"function","function":{"name":"g"}}]`), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestCallsAreFoundInAnswers(t *testing.T) {
	for text, want := range map[string]string{
		"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>":                                     `[{f {"a": 1}}] ""`,
		"Let me see. <tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call><tool_call>{\"name\":\"g\"}</tool_call>": `[{f {}} {g {}}] "Let me see."`,
		`{"name": "g", "parameters": {"b": [2]}}`:                                                                     `[{g {"b": [2]}}] ""`,
		`{"name": "f", "arguments": "{\"a\":1}"}`:                                                                     `[{f {"a":1}}] ""`,
		`{"name": "unknown", "arguments": {}}`:                                                                        `[] "{\"name\": \"unknown\", \"arguments\": {}}"`,
		"<tool_call>not JSON</tool_call>":                                                                             `[] "<tool_call>not JSON"`,
		"plain text":                                                                                                  `[] "plain text"`,
		"cut <tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}":                                                     `[{f {"a":1}}] "cut"`,
	} {
		calls, rest := parseCalls(text, someTools(t))
		if got := fmt.Sprintf("%v %q", calls, rest); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// However an answer is cut into pieces, text before a call is shown and the call is
// not.
func TestASiftedStreamShowsTextAndNoCalls(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for text, want := range map[string]string{
		"hello <b>world</b>": "hello <b>world</b>", "a <tool_call>{}</tool_call>": "a ", "<tool_call>{}": "", ` {"name":"f"}`: "", "x {y}": "x {y}",
	} {
		for range 100 {
			var s sifter
			got := ""
			for rest := text; rest != ""; {
				n := min(len(rest), 1+rnd.IntN(4))
				got, rest = got+s.add(rest[:n]), rest[n:]
			}
			if got+s.held != text || (got != want && !strings.HasPrefix(want, got)) {
				t.Fatalf("%q: shown %q, held %q", text, got, s.held)
			}
		}
	}
}

func FuzzChatRequest(f *testing.F) {
	f.Add([]byte(`{"model":"m","messages":[],"stop":"x","tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":{"type":"function","function":{"name":"f"}},"logit_bias":{"1":2}}`))
	f.Add([]byte(`{"model":"m","response_format":{"type":"json_schema","json_schema":{"schema":{"type":"object"}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c chatRequest
		if json.Unmarshal(data, &c) != nil || c.checkChat() != nil {
			return
		}
		if _, err := c.sampling(0, 1); err != nil {
			return
		}
		if _, err := c.form(); err != nil && told(err) == "" {
			t.Error("an error without words")
		}
	})
}

func FuzzInputs(f *testing.F) {
	for _, s := range []string{`"a"`, `["a","b"]`, `[1,2]`, `[[1],[2]]`, `{}`, `null`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var in inputs
		if json.Unmarshal(data, &in) == nil && len(in.texts) > 0 && len(in.tokens) > 0 {
			t.Errorf("%s is both text and tokens", data)
		}
	})
}
