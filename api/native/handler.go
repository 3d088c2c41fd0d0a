package native

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"strings"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// maxBody bounds a JSON request, in bytes. Archives are streamed and not bound by it.
const maxBody = 4 << 20

// Config is what the API serves.
type Config struct {
	Node *node.Node
	Keys *tenant.Keys
	Log  *slog.Logger
	// Peers connects the node to others; empty for one that has none.
	Peers Peering
}

// New serves a node under /api/v1.
func New(cfg Config) http.Handler {
	local := NewLocal(cfg.Node, cfg.Keys, nil)
	local.peers = cfg.Peers
	return serve(server{backend: local, keys: cfg.Keys, log: cfg.Log, node: cfg.Node, carrier: cfg.Peers.Carrier})
}

// Handler serves a backend under /api/v1. A key that is not the node's root key
// sees its own team's sandboxes only and cannot reach into the host.
func Handler(b Backend, keys *tenant.Keys, log *slog.Logger) http.Handler {
	return serve(server{backend: b, keys: keys, log: log})
}

func serve(s server) http.Handler {
	mux := http.NewServeMux()
	all := routes()
	for _, rt := range all {
		mux.HandleFunc(rt.method+" "+rt.path, s.serve(rt))
	}
	mux.HandleFunc("GET /api/v1/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(describe(all)) // the client may have gone
	})
	mux.HandleFunc("/api/", func(w http.ResponseWriter, r *http.Request) {
		writeProblem(w, ProblemOf(sandbox.Errorf("native.Serve", sandbox.NotFound, r.Method+" "+r.URL.Path, "no such operation").
			WithHint("the operations are listed in /api/v1/openapi.json")))
	})
	return mux
}

type server struct {
	backend Backend
	keys    *tenant.Keys
	log     *slog.Logger
	// What leads to sandboxes that have moved to other nodes; nil where there is no such way.
	node    *node.Node
	carrier *carry.Carrier
}

// elsewhere passes a request on about a sandbox that has moved, and reports whether it did. Connections into it find their way
// by themselves.
func (s server) elsewhere(w http.ResponseWriter, r *http.Request, key tenant.Key) (bool, error) {
	ref := r.PathValue("ref")
	if s.carrier == nil || ref == "" || !strings.HasPrefix(r.URL.Path, "/api/v1/sandboxes/") || r.PathValue("port") != "" && r.Method == http.MethodGet {
		return false, nil
	}
	sb, err := s.node.Get(r.Context(), ref)
	if err != nil || sb.Moved == "" || key.Name != tenant.RootKey && key.Team != sb.Team {
		return false, nil
	}
	out := r.Clone(r.Context())
	out.URL.Path = strings.Replace(r.URL.Path, "/"+ref, "/"+sb.ID, 1)
	key.Forward(out.Header)
	return true, s.carrier.Forward(w, out, sb.Moved)
}

// call is one request being answered.
type call struct {
	ctx     context.Context
	backend Backend // bound to what the key may do
	w       http.ResponseWriter
	r       *http.Request
}

// route is one operation: how it is served and how it is described.
type route struct {
	method, path, summary string
	in, out               reflect.Type // of the JSON bodies; nil: none
	stream                bool         // out is the type of each line's result
	accepts, returns      string       // media types of bodies that are not JSON
	query                 []string     // names of query parameters
	serve                 func(*call) error
}

// none is the body of requests and answers that have none.
type none struct{}

// on makes the route of an operation with JSON on both sides.
func on[In, Out any](method, path, summary string, do func(*call, In) (Out, error), query ...string) route {
	return route{method: method, path: path, summary: summary, query: query, in: bodyType[In](), out: bodyType[Out](),
		serve: func(c *call) error {
			var in In
			if bodyType[In]() != nil {
				if err := readJSON(c.r, &in); err != nil {
					return err
				}
			}
			out, err := do(c, in)
			if err != nil {
				return err
			}
			if bodyType[Out]() == nil {
				c.w.WriteHeader(http.StatusNoContent)
				return nil
			}
			c.w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(c.w).Encode(out) // the client may have gone
			return nil
		}}
}

// onStream makes the route of an operation that reports progress while it works.
func onStream[In, P, R any](method, path, summary string, do func(*call, In, func(P)) (R, error), query ...string) route {
	return route{method: method, path: path, summary: summary, query: query, in: bodyType[In](), out: reflect.TypeFor[frame[P, R]](), stream: true,
		serve: func(c *call) error {
			var in In
			if bodyType[In]() != nil {
				if err := readJSON(c.r, &in); err != nil {
					return err
				}
			} else {
				// The work reads the body while progress is being written. What it leaves is
				// read here: the server would do so after it has ceased to watch the
				// connection, watch it again at the body's end, and panic at the next request.
				_ = http.NewResponseController(c.w).EnableFullDuplex()
				defer c.r.Body.Close()
			}
			serveProgress(c.ctx, c.w, func(ctx context.Context, report func(P)) (R, error) {
				c.ctx = ctx
				return do(c, in, report)
			})
			return nil
		}}
}

func bodyType[T any]() reflect.Type {
	if t := reflect.TypeFor[T](); t != reflect.TypeFor[none]() {
		return t
	}
	return nil
}

func readJSON(r *http.Request, v any) error {
	const op = "native.Serve"
	dec := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody))
	dec.DisallowUnknownFields() // a misspelt field must not be silently ignored
	err := dec.Decode(v)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, io.EOF):
		return nil // no body: all defaults
	case errors.As(err, &tooLarge):
		return sandbox.Errorf(op, sandbox.Invalid, "", "the request is larger than %d MiB", maxBody>>20)
	case err != nil:
		return sandbox.E(op, sandbox.Invalid, "", err).WithHint("the request's form is described in /api/v1/openapi.json")
	}
	return nil
}

// serve authenticates, binds the backend to the key and answers.
func (s server) serve(rt route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key, err := s.keys.Verify(r.Context(), secretOf(r))
		if err != nil {
			p := ProblemOf(err)
			p.Status, p.Title = http.StatusUnauthorized, http.StatusText(http.StatusUnauthorized)
			w.Header().Set("WWW-Authenticate", "Bearer")
			writeProblem(w, p)
			return
		}
		if gone, err := s.elsewhere(w, r, key); gone {
			if err != nil {
				writeProblem(w, ProblemOf(err))
			}
			return
		}
		backend := s.backend
		if key.Name != tenant.RootKey {
			backend = scoped{Backend: backend, team: key.Team}
		}
		err = rt.serve(&call{ctx: r.Context(), backend: backend, w: w, r: r})
		if err != nil {
			if sandbox.Is(err, sandbox.Internal) {
				s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "team", key.Team, "error", err)
			}
			writeProblem(w, ProblemOf(err))
		}
	}
}

// secretOf finds the key where clients of either habit put it.
func secretOf(r *http.Request) string {
	if key := r.Header.Get("X-API-Key"); key != "" {
		return key
	}
	key, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return key
}
