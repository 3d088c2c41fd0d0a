package openai

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Upstream is another server with this API: vLLM, llama.cpp, Ollama, OpenAI. Its
// models are asked for as NAME/MODEL, or as they are where no other has the name.
type Upstream struct {
	Name   string   `json:"name"`
	URL    string   `json:"url"`              // up to and with /v1
	Key    string   `json:"key,omitempty"`    // sent instead of the client's
	Models []string `json:"models,omitempty"` // empty asks the server

	mu    sync.Mutex
	known []string // what the server said
	asked time.Time
}

const (
	upstreamAsk   = 5 * time.Second // to answer which models it has
	upstreamKnown = time.Minute     // for how long that is believed
	maxListing    = 4 << 20         // bytes
)

// names lists the models of a server, each as NAME/MODEL. One that does not answer
// has those that it said last.
func (u *Upstream) names(ctx context.Context, log *slog.Logger) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.Models) == 0 && time.Since(u.asked) > upstreamKnown {
		u.asked = time.Now()
		list, err := u.list(ctx)
		if err == nil {
			u.known = list
		} else if log != nil {
			log.Warn("an upstream server does not say which models it has", "upstream", u.Name, "error", err)
		}
	}
	list := u.Models
	if len(list) == 0 {
		list = u.known
	}
	names := make([]string, len(list))
	for i, name := range list {
		names[i] = u.Name + "/" + name
	}
	return names
}

func (u *Upstream) list(ctx context.Context) ([]string, error) {
	const op = "openai.Upstream"
	ctx, cancel := context.WithTimeout(ctx, upstreamAsk)
	defer cancel()
	req, err := u.request(ctx, http.MethodGet, "/models", nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unavailable, u.Name, err)
	}
	defer res.Body.Close()
	var answer struct{ Data []struct{ ID string } }
	if res.StatusCode != http.StatusOK {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, u.Name, "the server answered %s", res.Status)
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxListing)).Decode(&answer); err != nil {
		return nil, sandbox.E(op, sandbox.Unavailable, u.Name, err)
	}
	var names []string
	for _, m := range answer.Data {
		names = append(names, m.ID)
	}
	return names, nil
}

func (u *Upstream) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(u.URL, "/")+path, body)
	if err != nil {
		return nil, sandbox.E("openai.Upstream", sandbox.Invalid, u.Name, err)
	}
	if u.Key != "" {
		req.Header.Set("Authorization", "Bearer "+u.Key)
	}
	return req, nil
}

// upstream is the server to ask for a model, nil when it is ours to serve.
func (a *api) upstream(ctx context.Context, model string) *Upstream {
	if a.Host.Knows(model) == nil {
		return nil
	}
	for i := range a.Upstreams {
		u := &a.Upstreams[i]
		if strings.HasPrefix(model, u.Name+"/") || slices.Contains(u.names(ctx, a.Log), u.Name+"/"+model) {
			return u
		}
	}
	return nil
}

// pass sends a request on and its answer back as it comes. The client's leaving ends
// both.
func (u *Upstream) pass(w http.ResponseWriter, r *http.Request, body []byte, model string) error {
	const op = "openai.Upstream"
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil {
		return jsonError(err)
	}
	name, err := json.Marshal(strings.TrimPrefix(model, u.Name+"/"))
	if err != nil {
		return err
	}
	fields["model"] = name
	if body, err = json.Marshal(fields); err != nil {
		return err
	}
	req, err := u.request(r.Context(), http.MethodPost, strings.TrimPrefix(r.URL.Path, "/v1"), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return sandbox.E(op, sandbox.Unavailable, u.Name, err)
	}
	defer res.Body.Close()
	for _, key := range []string{"Content-Type", "Retry-After", "X-Request-Id"} {
		if v := res.Header.Get(key); v != "" {
			w.Header().Set(key, v)
		}
	}
	w.WriteHeader(res.StatusCode)
	control, buf := http.NewResponseController(w), make([]byte, 32<<10)
	for {
		n, err := res.Body.Read(buf)
		if n > 0 {
			_ = control.SetWriteDeadline(time.Now().Add(sendTimeout))
			if _, err := w.Write(buf[:n]); err != nil {
				return nil // the client has gone
			}
			_ = control.Flush()
		}
		if err != nil {
			_ = control.SetWriteDeadline(time.Time{})
			if err != io.EOF {
				return http.ErrAbortHandler
			}
			return nil
		}
	}
}
