package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-run/atoll/api/openai"
	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/sandbox"
)

// Models is where language models are kept; several processes may share it.
func (h Home) Models() string { return h.path("models") }

// Upstreams reads which other servers with OpenAI's API are asked for models that
// are not here: the file models/upstreams.json, which need not be there.
func (h Home) Upstreams() ([]openai.Upstream, error) {
	const op = "daemon.Upstreams"
	name := h.path("models", "upstreams.json")
	data, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var list []openai.Upstream
	if err == nil {
		err = json.Unmarshal(data, &list)
	}
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, name, err).
			WithHint(`it is a list such as [{"name": "gpu", "url": "http://10.0.0.5:8000/v1"}]`)
	}
	return list, nil
}

// answerBytes bounds the answers that are kept.
const answerBytes = 256 << 20

// models opens what serves language models: OpenAI's API below /v1/, and its
// metrics. Nothing is loaded before somebody asks.
func (p *Parts) models(cfg Config) (http.Handler, prometheus.Collector, error) {
	upstreams, err := p.Home.Upstreams()
	if err != nil {
		return nil, nil, err
	}
	h, err := host.New(host.Config{Store: host.OpenStore(p.Home.Models()), Keep: p.Home.path("models", ".cache"), Log: cfg.Log})
	if err != nil {
		return nil, nil, err
	}
	p.closers = append(p.closers, h)
	answers, err := cache.OpenAnswers(p.Home.path("models", ".cache", "answers"), answerBytes)
	if err != nil {
		// The daemon starts on a full disk, too; then no answers are kept.
		cfg.Log.Warn("answers of models are not kept", "error", err)
	}
	verify := func(ctx context.Context, secret string) (string, error) {
		key, err := p.Keys.Verify(ctx, secret)
		return key.Team, err
	}
	api := openai.New(openai.Config{Host: h, Verify: verify, Upstreams: upstreams, Answers: answers, Log: cfg.Log})
	return api, openai.NewCollector(h, answers), nil
}
