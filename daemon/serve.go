package daemon

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/api/e2b"
	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

const (
	headerTimeout   = 10 * time.Second // to send a request's head: a slow client must not hold a connection for ever
	idleTimeout     = 10 * time.Minute // for a connection between requests
	shutdownTimeout = 5 * time.Second  // for requests under way when the daemon stops
)

// Run serves a node until ctx ends. Its sandboxes go on; the next daemon on the
// same directory finds them.
func Run(ctx context.Context, cfg Config) error {
	const op = "daemon.Run"
	p, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		if err := p.Close(context.WithoutCancel(ctx)); err != nil {
			cfg.Log.Error("closing", "error", err)
		}
	}()
	if err := p.rootKey(ctx); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return sandbox.E(op, sandbox.Conflict, cfg.Addr, err).WithHint("choose another address with ATOLL_ADDR or --addr")
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	if cfg.Domain == "" {
		cfg.Domain = net.JoinHostPort("localhost", port)
	}
	srv := &http.Server{
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ep := Endpoint{PID: os.Getpid(), URL: "http://" + dialable(ln.Addr().String()), Domain: cfg.Domain}
	var public *tls.Config
	if cfg.TLS {
		if public, err = p.tlsConfig(cfg); err != nil {
			return err
		}
		ep.URL = "https://" + dialable(ln.Addr().String())
	}
	if err := p.openPeers(cfg, ln.Addr()); err != nil {
		return err
	}
	srv.Handler = p.handler(cfg)
	p.peers.Carrier.UseAPI(forwarded(srv.Handler))
	ln = p.peers.Group.Split(ln, public)
	data, err := json.Marshal(ep)
	if err == nil {
		err = writeFile(p.Home.endpointFile(), data, 0o600)
	}
	if isFull(err) {
		// Whoever makes room must reach us. The file of the daemon before us has
		// the room that it takes; at worst a reader finds it half written.
		if err = overwrite(p.Home.endpointFile(), data); err != nil {
			cfg.Log.Error("the disk is full: tell clients by ATOLL_ADDR where this daemon is", "url", ep.URL, "error", err)
		}
	} else if err != nil {
		return sandbox.E(op, sandbox.Internal, p.Home.endpointFile(), err)
	}
	// The file stays when we end: Endpoint believes it only while the lock is held.

	background, stop := context.WithCancel(ctx)
	var preparing sync.WaitGroup
	preparing.Go(func() { p.prepare(background, cfg) })
	defer preparing.Wait() // before the node that it works on is closed
	defer stop()
	failed := make(chan error, 1)
	preparing.Go(func() { tend(background, cfg, p.peers.Group, p.peers.Carrier) })
	go func() { failed <- srv.Serve(ln) }()
	if cfg.Ready != nil {
		cfg.Ready(ep)
	}
	select {
	case err := <-failed:
		return sandbox.E(op, sandbox.Internal, cfg.Addr, err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return sandbox.E(op, sandbox.Internal, cfg.Addr, err)
	}
	return srv.Close() // streams that would never end by themselves
}

// handler is everything that the one port serves. Traffic for a sandbox is
// recognised by its host name or headers, whatever its path; the rest is
// divided by path.
func (p *Parts) handler(cfg Config) http.Handler {
	e2bAPI := e2b.New(e2b.Config{Node: p.Node, Keys: p.Keys, Domain: cfg.Domain, Log: cfg.Log, Forward: p.peers.Carrier.Forward})
	mux := http.NewServeMux()
	mux.Handle("/api/", native.New(native.Config{Node: p.Node, Keys: p.Keys, Peers: p.peers, Log: cfg.Log}))
	models, modelMetrics, err := p.models(cfg)
	if err != nil {
		cfg.Log.Error("language models are not served", "error", err)
	} else {
		mux.Handle("/v1/", models)
	}
	mux.Handle("GET /metrics", p.rootOnly(newMetrics(p.Node, modelMetrics, p.chunkMetrics())))
	mux.Handle("/", e2bAPI)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if e2b.IsTraffic(r) {
			e2bAPI.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// forwarded serves requests that a node which is trusted passes on, in the name of the key that it has verified.
func forwarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(tenant.Verified(r.Context(), tenant.Forwarded(r.Header))))
	})
}

// rootOnly serves those who show the root key: what is told here concerns all
// teams.
func (p *Parts) rootOnly(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secret := r.Header.Get("X-API-Key")
		if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
			secret = bearer
		}
		if key, err := p.Keys.Verify(r.Context(), secret); err != nil || key.Name != tenant.RootKey {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "the root key is needed, see the file credentials in the state directory", http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func (p *Parts) tlsConfig(cfg Config) (*tls.Config, error) {
	ca, err := p.Home.authority()
	if err != nil {
		return nil, err
	}
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	domain := cfg.Domain
	if h, _, err := net.SplitHostPort(domain); err == nil {
		domain = h
	}
	if domain != "localhost" {
		hosts = append([]string{domain}, hosts...)
	}
	if h, _, err := net.SplitHostPort(cfg.Addr); err == nil && net.ParseIP(h) != nil && !net.ParseIP(h).IsUnspecified() {
		hosts = append(hosts, h)
	}
	return ca.server(hosts...)
}

// prepare makes what sandboxes start from, so that the first request does not
// wait for it: the base template, then the pools.
func (p *Parts) prepare(ctx context.Context, cfg Config) {
	report := func(p image.Progress) { cfg.Log.Info("making the base template", "stage", p.Stage) }
	if _, err := p.Node.EnsureBase(ctx, report); err != nil {
		if ctx.Err() == nil {
			cfg.Log.Error("the base template could not be made; it is tried again when it is asked for", "error", err)
		}
		return
	}
	for template, size := range cfg.Pools {
		if err := p.Node.SetPool(ctx, template, size); err != nil {
			cfg.Log.Error("setting up a pool", "template", template, "error", err)
		}
	}
	cfg.Log.Info("ready", "template", node.BaseTemplate)
}

// rootKey sees to it that the first key exists and is written where its owner,
// and only he, can read it.
func (p *Parts) rootKey(ctx context.Context) error {
	const op = "daemon.rootKey"
	data, err := os.ReadFile(p.Home.Credentials())
	if err == nil {
		_, err = p.Keys.Add(ctx, strings.TrimSpace(string(data)), tenant.DefaultTeam, tenant.RootKey)
		return err
	}
	if !errors.Is(err, os.ErrNotExist) {
		return sandbox.E(op, sandbox.Internal, p.Home.Credentials(), err)
	}
	secret, _, err := p.Keys.Create(ctx, tenant.DefaultTeam, tenant.RootKey)
	if err != nil {
		return err
	}
	if err := writeFile(p.Home.Credentials(), []byte(secret+"\n"), 0o600); err != nil {
		return sandbox.E(op, sandbox.Internal, p.Home.Credentials(), err)
	}
	return nil
}

// dialable turns an address to listen on into one to connect to.
func dialable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
