// Package carry moves snapshots, images, language models and running sandboxes between nodes, as few bytes as can be.
//
// A move is a push: the node that has something offers it to one that has not. The offer names every file by its digest, and
// the older files that the sender could describe it by. The receiver says which it has; what is lacking then travels as a
// delta (package transfer), cut into chunks, over all connections at once. The receiver keeps the chunks until all are there,
// rebuilds the files, compares them with their digests, and only then makes the whole visible. A delta is a function of its
// files, so that a push that was broken off, by either end, finds its chunks where they are and sends the rest. A pull is a
// push that the receiver asks for, over connections that it dialled.
package carry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/bucket"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/fetch"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/migrate"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// Kind is what is moved.
type Kind string

// The kinds.
const (
	Snapshot Kind = "snapshot"
	Image    Kind = "image"
	Model    Kind = "model"
)

// Config is what a Carrier stands on. It owns none of it.
type Config struct {
	Snapshots *snapshot.Store
	Images    *image.Store
	Models    *host.Store
	Node      *node.Node
	Stage     *chunk.Disk // where chunks wait; nothing else is in it
	Pacer     *pace.Pacer
	Cache     *cache.Cache   // of chunks that come one by one; nil: none are kept
	Store     *bucket.Bucket // an object store; nil: none
	// StoreRules say how long it keeps what no name leads to.
	StoreRules chunk.Rules
	Log        *slog.Logger
	// Patience is how long a push goes on trying when nothing gets through; 0 means 10 minutes.
	Patience time.Duration
}

// Carrier moves things. It is safe for use by several goroutines.
type Carrier struct {
	cfg   Config
	group *peer.Group // set by Use
	meter *pack.Meter
	fetch *fetch.Fetcher
	vault *chunk.Vault // over cfg.Store; nil without one
	mux   *http.ServeMux
	api   http.Handler // set by UseAPI

	known      known
	arrivals   arrivals
	departures departures
	closed     chan struct{} // closed by Close
	closeOnce  sync.Once
	fault      func(migrate.Step) (migrate.Outcome, error) // nil but in tests: an error of it is what comes of a step
	life       context.Context                             // ends with Close
	end        context.CancelFunc

	mu       sync.Mutex
	sessions map[string]*session // pushes under way to this node, by ID; at most maxSessions
	digests  map[string]chunk.ID // of files that have none in their manifest, by path; at most maxDigests
}

const maxDigests = 4096

// New returns a carrier; its Handler serves peers, and Use gives it the way to them.
func New(cfg Config) *Carrier {
	if cfg.Patience == 0 {
		cfg.Patience = 10 * time.Minute
	}
	c := &Carrier{cfg: cfg, meter: pack.NewMeter(nil), mux: http.NewServeMux(),
		sessions: make(map[string]*session), digests: make(map[string]chunk.ID), closed: make(chan struct{}),
		arrivals: arrivals{prepared: make(map[string]*arrival)}}
	if cfg.Cache == nil {
		cfg.Cache = cache.New()
	}
	from := fetch.Config{Cache: cfg.Cache, Files: c.file, Pacer: cfg.Pacer, Meter: c.meter, Log: cfg.Log}
	if cfg.Store != nil {
		c.vault = chunk.NewVault(cfg.Store)
		from.Store = c.vault
	}
	c.fetch = fetch.New(from)
	c.fetch.Handle(c.mux)
	c.life, c.end = context.WithCancel(context.Background())
	c.mux.HandleFunc("POST /carry/v1/offers", c.serveOffer)
	c.mux.HandleFunc("POST /carry/v1/sessions/{id}/missing", c.serveMissing)
	c.mux.HandleFunc("PUT /carry/v1/sessions/{id}/chunks/{chunk}", c.serveChunk)
	c.mux.HandleFunc("POST /carry/v1/sessions/{id}/commit", c.serveCommit)
	c.mux.HandleFunc("POST "+streamPath, c.serveStream)
	c.mux.HandleFunc("POST "+describePath, c.serveDescribe)
	c.mux.HandleFunc("GET "+cutPath, c.servePart)
	c.mux.HandleFunc("GET "+finePath, c.serveFine)
	c.mux.HandleFunc("GET "+besidePath, c.serveBeside)
	c.mux.HandleFunc("POST /carry/v1/pulls", c.servePull)
	c.mux.HandleFunc("POST /carry/v1/moves/{what}", c.serveMove)
	c.mux.HandleFunc("POST "+livePath, c.serveLive)
	c.mux.HandleFunc("POST /carry/v1/reach/{sandbox}/{port}", c.serveReach)
	c.mux.HandleFunc(forwardPath, c.serveForwarded)
	return c
}

// Handler answers peers, for peer.Config.
func (c *Carrier) Handler() http.Handler { return c.mux }

// Use sets the group whose peers things are moved to, before anything is moved. From then on whoever asks for a sandbox that
// has moved is sent to where it is.
func (c *Carrier) Use(g *peer.Group) {
	c.group = g
	c.fetch.Use(g)
	if c.cfg.Node != nil {
		c.cfg.Node.UseForward(c.reach)
	}
}

// Fetched returns from how far chunks came that were fetched one by one.
func (c *Carrier) Fetched() []fetch.Stats { return c.fetch.Stats() }

// Close ends the waiting of moves that cannot end now; Recover goes on with them after the next start.
func (c *Carrier) Close() error {
	c.closeOnce.Do(func() {
		close(c.closed)
		c.end()
	})
	return nil
}

// Progress is how far a move is.
type Progress struct {
	Stage string        `json:"stage"`          // "sending", "fetching"
	Done  int64         `json:"done"`           // bytes of the thing itself
	Total int64         `json:"total"`          // of the same
	Wire  int64         `json:"wire"`           // bytes that were sent
	Left  time.Duration `json:"left,omitempty"` // as it goes now; 0: not known yet
	// Waiting says why nothing goes on; it does when that has passed. Empty when it goes on.
	Waiting string `json:"waiting,omitempty"`
}

// Result is what a move took.
type Result struct {
	ID    string        `json:"id"`
	Size  int64         `json:"size"`  // of the thing itself, in bytes
	Wire  int64         `json:"wire"`  // bytes of chunks and what describes them that were sent, this time
	Held  int64         `json:"held"`  // bytes of files that the receiver had as they are
	Files []FileResult  `json:"files"` // of the rest
	Took  time.Duration `json:"took"`
}

// FileResult is how one file was sent.
type FileResult struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Wire   int64  `json:"wire"`
	Method string `json:"method"` // see package transfer
}

// offer describes what a sender has. It is JSON.
type offer struct {
	Kind  Kind            `json:"kind"`
	ID    string          `json:"id"`
	Meta  json.RawMessage `json:"meta"` // the manifest of a snapshot, the record of an image or a model
	Files []offered       `json:"files"`
}

// offered is one file.
type offered struct {
	Name   string     `json:"name"` // "root" is the EROFS root, "state/..." belongs to a snapshot, "weights" are a model's
	Size   int64      `json:"size"`
	Digest chunk.ID   `json:"digest"`          // BLAKE3 of its content
	Bases  []chunk.ID `json:"bases,omitempty"` // digests of older files that the sender has, the best first
}

const (
	rootName    = "root"
	weightsName = "weights"
	statePrefix = "state/"

	maxOffer = 4 << 20 // bytes
	maxFiles = 4096
	maxBases = 16
	maxFile  = 1 << 40 // bytes
)

// terms are what the receiver answers.
type terms struct {
	Session string `json:"session,omitempty"`
	Have    bool   `json:"have,omitempty"`   // the whole is there
	Staged  bool   `json:"staged,omitempty"` // there are chunks of earlier attempts: ask which
	Files   []term `json:"files,omitempty"`
}

// term is about one file.
type term struct {
	Held bool      `json:"held,omitempty"` // the receiver has it
	Base *chunk.ID `json:"base,omitempty"` // the older file to describe it by
}

// check says why an offer makes no sense.
func (o offer) check() error {
	if o.Kind != Snapshot && o.Kind != Image && o.Kind != Model {
		return fmt.Errorf("there is no kind %.20q", o.Kind)
	}
	if len(o.Files) > maxFiles {
		return fmt.Errorf("%d files are too many", len(o.Files))
	}
	seen := make(map[string]bool)
	for _, f := range o.Files {
		if f.Size < 0 || f.Size > maxFile || len(f.Bases) > maxBases || seen[f.Name] {
			return fmt.Errorf("the file %.80q makes no sense", f.Name)
		}
		seen[f.Name] = true
		only := rootName
		if o.Kind == Model {
			only = weightsName
		}
		if name, state := strings.CutPrefix(f.Name, statePrefix); f.Name != only && !(state && name != "" && o.Kind == Snapshot) {
			return fmt.Errorf("the file %.80q belongs to nothing", f.Name)
		}
	}
	return nil
}

// digestOf is the inverse of named.
func digestOf(named string) (chunk.ID, error) {
	text, ok := strings.CutPrefix(named, "blake3:")
	id, err := chunk.ParseID(text)
	if !ok {
		err = errors.New("not a BLAKE3 digest")
	}
	return id, err
}

// named is how snapshots and roots write a digest.
func named(id chunk.ID) string { return "blake3:" + id.String() }

// cores is how many processors a move may use.
func cores() int { return runtime.GOMAXPROCS(0) }

// fail gives an error an operation, and its kind when it has none.
func fail(op, subject string, kind sandbox.Kind, err error) error {
	if known := sandbox.KindOf(err); known != sandbox.Internal {
		kind = known
	}
	return sandbox.E(op, kind, subject, err)
}
