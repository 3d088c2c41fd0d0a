// Package server is the guest agent's side of the guest protocol, which is
// E2B's envd protocol with a few additions.
//
// It serves the Connect services process.Process and filesystem.Filesystem and
// these plain HTTP calls. Unless said otherwise they need the header
// X-Access-Token once POST /init has set a token, act for the user in
// "Authorization: Basic base64(user:)" (or, for files, the query parameter
// username), and answer errors with JSON {code, message}.
//
//	GET  /health          204; needs no token
//	POST /init            wire.Init; see Server.init for who may call it
//	GET  /metrics         wire.Metrics
//	GET  /envs            the variables that every process gets
//	GET  /files?path=     content; Range, gzip; signed URLs instead of a token
//	POST /files?path=     octet-stream or multipart; gzip; X-Metadata-*; signed URLs
//
// Atoll's additions:
//
//	GET  /archive?path=   a tar stream of a directory or a file
//	POST /archive?path=   extracts a tar stream into a directory
//	GET  /logs?since=SEQ&follow=BOOL
//	                      wire.LogEntry as JSON lines, those after SEQ that are
//	                      still kept (1 MiB); follow: and then those to come
//	POST /connect?port=   with "Upgrade: tcp": 101, then the connection is one
//	                      to that TCP port on loopback; 502 if nothing listens
//	POST /shutdown?grace=SECONDS
//	                      SIGTERM to all processes, SIGKILL after the grace (10,
//	                      at most 600); 204 when they are gone, then the agent ends
//
// A connection that begins with a zero instead carries a lasting one (package lasting), to the agent or to a port on loopback.
//
// File names that are not valid UTF-8 travel as described at wire.EncodeName.
package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/atoll-run/atoll/guest/gen/filesystem/filesystemconnect"
	"github.com/atoll-run/atoll/guest/gen/process/processconnect"
	"github.com/atoll-run/atoll/guest/lasting"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	maxMessage    = 64 << 20 // bytes of one Connect message
	maxBody       = 1 << 20  // bytes of a JSON body
	headerTimeout = 30 * time.Second
	gzipMin       = 4 << 10 // bytes: smaller answers are not worth compressing
)

// Server is the guest agent. It takes over the process's children, so there is
// one at most in a process, and nothing else in it may wait for children.
type Server struct {
	Config
	settings  settings
	own       ownFiles
	reaper    *reaper
	processes processTab
	watchers  watcherTab
	logs      *logRing
	cpu       cpuMeter
	oom       oomCounter
	lasting   lasting.Guest // connections that outlive the way to here
	agent     *queue        // those of them that are to the agent itself
	answering sync.Once     // them
	stop      sync.Once
	stopped   chan struct{}
}

// Config is what a Server has to know about where it runs.
type Config struct {
	Log     *slog.Logger // gets what goes wrong inside the agent; not nil
	PID1    bool         // the host name is the sandbox's own: /init may change it
	Machine bool         // the kernel is the sandbox's own: /init may set the clock
	Changes ChangesFunc  // of a machine that booted into an overlay; else nil
	// Groups are open files of control groups ("tasks" in version 1,
	// "cgroup.threads" in version 2) that all processes join which the agent
	// starts, and the agent does not; none: they stay in its own.
	Groups []*os.File
	// PidsMax is the open file that bounds how many processes and threads may be
	// in one of Groups; nil: that cannot be bounded.
	PidsMax *os.File
}

// New makes a Server.
func New(cfg Config) *Server {
	s := &Server{
		Config:    cfg,
		settings:  settings{env: map[string]string{}},
		reaper:    newReaper(cfg.Groups),
		processes: processTab{all: map[int]*process{}},
		watchers:  watcherTab{all: map[string]*pollWatcher{}},
		logs:      newLogRing(),
		oom:       openOOMCounter(),
		agent:     newQueue(),
		stopped:   make(chan struct{}),
	}
	s.lasting.Allows = s.settings.allows
	s.lasting.Serve = func(port int) (func(net.Conn), error) {
		if port == sandbox.GuestPort {
			return s.agent.put, nil
		}
		return dialPort(port)
	}
	return s
}

// Stopped is closed when /shutdown has ended all processes and its answer is out.
func (s *Server) Stopped() <-chan struct{} { return s.stopped }

// Serve answers on l until l is closed or fails. A failed listener is no end:
// the caller may open another and serve on that.
func (s *Server) Serve(l net.Listener) error {
	s.answering.Do(func() { go func() { _ = s.serveHTTP(s.agent) }() })
	return s.serveHTTP(s.lasting.Listen(l))
}

func (s *Server) serveHTTP(l net.Listener) error {
	srv := &http.Server{
		Handler: s.Handler(),
		// No deadline but this one: streams and large files last as long as they
		// last, and a clock that jumps after a restore must not cut them.
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	return srv.Serve(l)
}

// Handler answers every call of the protocol.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	opts := []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage), connect.WithCompressMinBytes(gzipMin)}
	mux.Handle(processconnect.NewProcessHandler(processService{s}, opts...))
	mux.Handle(filesystemconnect.NewFilesystemHandler(filesystemService{s}, opts...))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /init", s.init)
	mux.HandleFunc("GET /metrics", s.metrics)
	mux.HandleFunc("GET /envs", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.settings.environment()) })
	mux.HandleFunc("GET /files", s.download)
	mux.HandleFunc("POST /files", s.upload)
	mux.HandleFunc("GET /archive", s.pack)
	mux.HandleFunc("POST /archive", s.unpack)
	mux.HandleFunc("GET /logs", s.readLogs)
	mux.HandleFunc("POST /connect", s.tunnel)
	mux.HandleFunc("POST /shutdown", s.shutdown)
	return s.guard(mux)
}

// guard lets calls through that may come in, with their user in the context.
func (s *Server) guard(next http.Handler) http.Handler {
	// These prove themselves in another way, or have nothing to hide.
	exempt := map[string]bool{"GET /health": true, "POST /init": true, "GET /files": true, "POST /files": true}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !exempt[r.Method+" "+r.URL.Path] && !s.settings.allows(r.Header.Get(wire.HeaderToken)) {
			writeError(w, http.StatusUnauthorized, "unauthorized access, please provide a valid access token")
			return
		}
		// Some clients say "no time-out" so; Connect would take it as "already over".
		if r.Header.Get(wire.HeaderTimeout) == "0" {
			r.Header.Del(wire.HeaderTimeout)
		}
		user, group, _ := r.BasicAuth()
		if group != "" {
			user += ":" + group
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), userKey{}, user)))
	})
}

type userKey struct{}

// userOf returns the user that the caller asked for; empty for the default.
func userOf(ctx context.Context) string {
	user, _ := ctx.Value(userKey{}).(string)
	return user
}

// requestUser is userOf for plain HTTP calls, where username may name the user.
func requestUser(r *http.Request) string {
	if user := r.URL.Query().Get("username"); user != "" {
		return user
	}
	return userOf(r.Context())
}

func writeJSON(w http.ResponseWriter, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(body) // fails only when the client left
}

func writeError(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(wire.Error{Code: code, Message: strings.ToValidUTF8(message, "\ufffd")})
}

// statusOf maps what the system said to an HTTP status.
func statusOf(err error) int {
	switch {
	case isNoSpace(err):
		return http.StatusInsufficientStorage
	case os.IsNotExist(err):
		return http.StatusNotFound
	case os.IsPermission(err):
		return http.StatusForbidden
	}
	return http.StatusInternalServerError
}
