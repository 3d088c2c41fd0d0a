// Package openai serves language models by the API of OpenAI.
package openai

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/sandbox"
)

// Config is what the API needs.
type Config struct {
	Host *host.Host
	// Verify returns the tenant of an API key; nil lets everybody in, as one tenant.
	Verify func(ctx context.Context, secret string) (tenant string, err error)
	// Upstreams are other servers with this API, asked for models that are not
	// here, in this order.
	Upstreams []Upstream
	Answers   *cache.Answers // nil keeps no answers
	Log       *slog.Logger
}

const (
	maxBody    = 32 << 20 // bytes of a request
	maxChoices = 16       // answers to one request
	bodyTime   = 2 * time.Minute
)

type api struct {
	Config
	started int64 // Unix seconds, for what has no date of its own
}

// New makes the handler of everything below /v1/.
func New(c Config) http.Handler {
	a := &api{Config: c, started: time.Now().Unix()}
	mux := http.NewServeMux()
	for pattern, h := range map[string]func(http.ResponseWriter, *http.Request, string) error{
		"GET /v1/models":            a.listModels,
		"GET /v1/models/{model...}": a.getModel,
		"POST /v1/chat/completions": a.chat,
		"POST /v1/completions":      a.complete,
		"POST /v1/embeddings":       a.embed,
	} {
		mux.HandleFunc(pattern, a.authorised(h))
	}
	mux.HandleFunc("/v1/", func(w http.ResponseWriter, r *http.Request) {
		a.fail(w, r, &apiError{status: http.StatusNotFound, Type: invalidRequest, Code: "unknown_url",
			Message: "Unknown request URL: " + r.Method + " " + r.URL.Path + ". Please check the URL for typos."})
	})
	return mux
}

// authorised serves those who have a key, and tells h which tenant asks.
func (a *api) authorised(h func(http.ResponseWriter, *http.Request, string) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		tenant := ""
		if a.Verify != nil {
			secret, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
			if secret == "" {
				secret = r.Header.Get("X-API-Key")
			}
			var err error
			if tenant, err = a.Verify(r.Context(), secret); err != nil {
				a.fail(w, r, &apiError{status: http.StatusUnauthorized, Type: invalidRequest, Code: "invalid_api_key",
					Message: "Incorrect API key provided. Make one with `atoll key create`."})
				return
			}
		}
		if err := h(w, r, tenant); err != nil {
			a.fail(w, r, err)
		}
	}
}

// body reads a request's JSON into v and returns it as it came as well.
func body(w http.ResponseWriter, r *http.Request, v any) ([]byte, error) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime)) // a writer without deadlines has a server with none
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, &apiError{status: http.StatusRequestEntityTooLarge, Type: invalidRequest, Message: "The request is larger than 32 MB."}
	case err != nil:
		return nil, sandbox.E("openai.body", sandbox.Canceled, "", err)
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // answering may take long
	if err := json.Unmarshal(data, v); err != nil {
		return nil, jsonError(err)
	}
	return data, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the client may have gone
}

// modelObject is a model as the API lists it.
type modelObject struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func (a *api) models(ctx context.Context) ([]modelObject, error) {
	list := []modelObject{}
	infos, err := a.Host.List()
	if err != nil {
		return nil, err
	}
	for _, info := range infos {
		created := info.Imported.Unix()
		if info.Imported.IsZero() {
			created = a.started
		}
		list = append(list, modelObject{info.Name, "model", created, "atoll"})
	}
	for i := range a.Upstreams {
		u := &a.Upstreams[i]
		for _, name := range u.names(ctx, a.Log) {
			list = append(list, modelObject{name, "model", a.started, u.Name})
		}
	}
	return list, nil
}

func (a *api) listModels(w http.ResponseWriter, r *http.Request, _ string) error {
	list, err := a.models(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{"object": "list", "data": list})
	return nil
}

func (a *api) getModel(w http.ResponseWriter, r *http.Request, _ string) error {
	list, err := a.models(r.Context())
	if err != nil {
		return err
	}
	for _, m := range list {
		if m.ID == r.PathValue("model") {
			writeJSON(w, http.StatusOK, m)
			return nil
		}
	}
	return a.noModel(r.PathValue("model"))
}

// noModel is the answer to a request for a model that is not here.
func (a *api) noModel(name string) error {
	err := a.Host.Knows(name)
	return &apiError{status: http.StatusNotFound, Type: invalidRequest, Code: "model_not_found", Param: "model",
		Message: "The model `" + name + "` does not exist: " + sandbox.HintOf(err) + "."}
}

// use returns a local model. Only what was imported is served: a path or an address
// is for the command line.
func (a *api) use(r *http.Request, name string) (*host.Model, func(), error) {
	if a.Host.Knows(name) != nil {
		return nil, nil, a.noModel(name)
	}
	return a.Host.Use(r.Context(), name)
}
