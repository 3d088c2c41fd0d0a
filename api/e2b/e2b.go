// Package e2b serves E2B's API on a node, so that E2B's own SDKs and command
// line work against it unchanged.
//
// One handler serves two planes. Requests that name a sandbox by host name
// ("{port}-{id}.{domain}") or by the headers E2b-Sandbox-Id and
// E2b-Sandbox-Port are the data plane: they go to a port inside that sandbox.
// All others are the control plane, the REST API in both of its generations.
package e2b

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// Config is what the API stands on.
type Config struct {
	Node *node.Node
	Keys *tenant.Keys
	// Domain is under which clients reach sandboxes as "{port}-{id}.{domain}",
	// with a port if it is not the usual one. Empty: clients use the domain that
	// they were configured with.
	Domain string
	Log    *slog.Logger
	// Forward has the node answer to which a sandbox has moved; nil: no sandbox moves.
	Forward func(w http.ResponseWriter, r *http.Request, node string) error
}

// api is the handler's state. It is not changed after New.
type api struct {
	node    *node.Node
	keys    *tenant.Keys
	domain  string
	log     *slog.Logger
	rest    http.Handler
	proxy   *proxy
	uploads uploads
	forward func(w http.ResponseWriter, r *http.Request, node string) error
}

// New returns the handler of both planes. Routes that it does not know it
// answers with 404 in JSON.
func New(c Config) http.Handler {
	a := &api{node: c.Node, keys: c.Keys, domain: c.Domain, log: c.Log, uploads: newUploads(), forward: c.Forward}
	a.proxy = newProxy(c.Node, c.Log)
	a.rest = a.routes()
	return a
}

// ServeHTTP sends a request to its plane.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if to, ok := addressOf(r); ok {
		a.proxy.serve(w, r, to)
		return
	}
	if id, ok := a.signedFor(r); ok {
		a.proxy.serve(w, r, address{id: id, port: sandbox.GuestPort})
		return
	}
	a.logged(w, r)
}

// routes is the control plane. Paths are those that the SDKs and the command
// line call, with older generations beside newer ones.
func (a *api) routes() http.Handler {
	mux := http.NewServeMux()
	for pattern, h := range map[string]handler{
		"GET /sandboxes":                        a.listRunning,
		"GET /v2/sandboxes":                     a.listSandboxes,
		"POST /sandboxes":                       a.createV1,
		"POST /v2/sandboxes":                    a.createV2,
		"GET /sandboxes/metrics":                a.manyMetrics,
		"GET /sandboxes/{id}":                   a.getSandbox,
		"DELETE /sandboxes/{id}":                a.killSandbox,
		"POST /sandboxes/{id}/connect":          a.connect,
		"POST /v2/sandboxes/{id}/connect":       a.connect,
		"POST /sandboxes/{id}/pause":            a.pause,
		"POST /sandboxes/{id}/resume":           a.resume,
		"POST /sandboxes/{id}/timeout":          a.setTimeout,
		"POST /sandboxes/{id}/refreshes":        a.refresh,
		"POST /sandboxes/{id}/snapshots":        a.createSnapshot,
		"POST /sandboxes/{id}/fork":             a.fork,
		"PUT /sandboxes/{id}/network":           a.updateNetwork,
		"GET /sandboxes/{id}/metrics":           a.metrics,
		"GET /sandboxes/{id}/logs":              a.logsV1,
		"GET /v2/sandboxes/{id}/logs":           a.logsV2,
		"GET /snapshots":                        a.listSnapshots,
		"GET /teams":                            a.listTeams,
		"GET /teams/{team}/metrics":             a.teamMetrics,
		"GET /teams/{team}/metrics/max":         a.teamMetricsMax,
		"GET /templates":                        a.listTemplates,
		"GET /v2/templates":                     a.pageTemplates,
		"POST /v3/templates":                    a.requestBuild,
		"GET /templates/{id}":                   a.getTemplate,
		"PATCH /templates/{id}":                 a.updateTemplateV1,
		"PATCH /v2/templates/{id}":              a.updateTemplate,
		"DELETE /templates/{id}":                a.deleteTemplate,
		"GET /templates/{id}/{what}":            a.aliasOrTags,
		"POST /templates/tags":                  a.assignTags,
		"DELETE /templates/tags":                a.removeTags,
		"GET /templates/{id}/files/{hash}":      a.uploadLink,
		"POST /v2/templates/{id}/builds/{b}":    a.startBuild,
		"GET /templates/{id}/builds/{b}/status": a.buildStatus,
		"GET /templates/{id}/builds/{b}/logs":   a.buildLogs,
		"GET /volumes":                          a.listVolumes,
		"POST /volumes":                         a.createVolume,
		"GET /volumes/{id}":                     a.getVolume,
		"DELETE /volumes/{id}":                  a.deleteVolume,
	} {
		mux.Handle(pattern, a.authenticated(h))
	}
	// These carry proof of their own.
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux.HandleFunc("PUT /templates/{id}/files/{hash}/content", a.upload)
	mux.HandleFunc("GET /volumecontent/{id}/dir", a.inVolume(a.listDir))
	mux.HandleFunc("POST /volumecontent/{id}/dir", a.inVolume(a.makeDir))
	mux.HandleFunc("GET /volumecontent/{id}/path", a.inVolume(a.statPath))
	mux.HandleFunc("PATCH /volumecontent/{id}/path", a.inVolume(a.changePath))
	mux.HandleFunc("DELETE /volumecontent/{id}/path", a.inVolume(a.removePath))
	mux.HandleFunc("GET /volumecontent/{id}/file", a.inVolume(a.readFile))
	mux.HandleFunc("PUT /volumecontent/{id}/file", a.inVolume(a.writeFile))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.fail(w, r, notFound("there is no %s %s here", r.Method, r.URL.Path))
	})
	return mux
}

// handler serves a request of a team that has proved who it is.
type handler func(w http.ResponseWriter, r *http.Request, key tenant.Key)

// authenticated lets requests with a valid API key through.
func (a *api) authenticated(next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := a.keys.Verify(r.Context(), presentedKey(r))
		if err != nil {
			rec := recordOf(r.Context())
			rec.err = err
			writeJSON(w, http.StatusUnauthorized, apiError{Code: http.StatusUnauthorized, Message: messageOf(err)})
			return
		}
		recordOf(r.Context()).team = key.Team
		if !a.elsewhere(w, r, key) {
			next(w, r, key)
		}
	})
}

// elsewhere has another node answer about a sandbox that has moved there, and reports whether it did.
func (a *api) elsewhere(w http.ResponseWriter, r *http.Request, key tenant.Key) bool {
	if a.forward == nil || !strings.Contains(r.Pattern, "/sandboxes/{id}") {
		return false
	}
	sb, err := a.node.Get(r.Context(), shortID(r.PathValue("id")))
	if err != nil || sb.Moved == "" || sb.Team != key.Team {
		return false
	}
	out := r.Clone(r.Context())
	key.Forward(out.Header)
	if err := a.forward(w, out, sb.Moved); err != nil {
		a.fail(w, r, err)
	}
	return true
}

// presentedKey is the key that a request carries; empty if it has none.
func presentedKey(r *http.Request) string {
	if k := r.Header.Get("X-API-Key"); k != "" {
		return k
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return token
	}
	return ""
}

// record collects what the request log says about one request.
type record struct {
	id   string
	team string
	err  error
}

type recordKey struct{}

// recordOf returns the request's record; every request through logged has one.
func recordOf(ctx context.Context) *record {
	rec, _ := ctx.Value(recordKey{}).(*record)
	return rec
}

// logged serves the control plane: it gives each request an ID, writes one line
// about it, and turns a panic into a 500 that hides nothing from the log.
func (a *api) logged(w http.ResponseWriter, r *http.Request) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	rec := &record{id: hex.EncodeToString(b[:])}
	w.Header().Set("X-Request-Id", rec.id)
	sw := &statusWriter{ResponseWriter: w}
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(p)
			}
			rec.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			if sw.status == 0 {
				writeJSON(sw, http.StatusInternalServerError, apiError{Code: 500, Message: "internal error"})
			}
		}
		a.note(r, rec, cmp.Or(sw.status, http.StatusOK), time.Since(begin))
	}()
	r = r.WithContext(context.WithValue(r.Context(), recordKey{}, rec))
	// Otherwise what cannot be read would pass for what was not given.
	if _, err := url.ParseQuery(r.URL.RawQuery); err != nil {
		a.reject(sw, r, "the query cannot be read: %v", err)
		return
	}
	a.rest.ServeHTTP(sw, r)
}

func (a *api) note(r *http.Request, rec *record, status int, took time.Duration) {
	level := slog.LevelDebug
	if status >= http.StatusInternalServerError {
		level = slog.LevelError
	}
	attrs := []any{"id", rec.id, "method", r.Method, "path", r.URL.Path, "status", status, "took", took}
	if rec.team != "" {
		attrs = append(attrs, "team", rec.team)
	}
	if rec.err != nil {
		attrs = append(attrs, "error", rec.err)
	}
	a.log.Log(r.Context(), level, "e2b request", attrs...)
}

// statusWriter remembers the status for the log.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
