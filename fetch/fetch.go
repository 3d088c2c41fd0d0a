package fetch

import (
	"context"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// Store names the object store as the source of a chunk; a node's ID has another form.
const Store = "store"

// A Piece is one chunk of a file: a node that has the whole file can read it there.
type Piece struct {
	ID   chunk.ID
	File chunk.ID // BLAKE3 of the file
	At   int64    // its first byte in the file
	Size int      // in bytes
}

// Config is what a Fetcher stands on. It owns none of it.
type Config struct {
	Cache *cache.Cache
	// Files finds a file of this node that nobody changes by the BLAKE3 of its content.
	Files func(digest chunk.ID) (path string, ok bool)
	Store chunk.Store // the object store; nil: there is none
	Pacer *pace.Pacer
	Meter *pack.Meter // of the links and the processor; shared with whoever else sends
	Log   *slog.Logger
}

// Fetcher gets chunks, for this node and for others. It is safe for use by several goroutines.
type Fetcher struct {
	cfg   Config
	group *peer.Group // set by Use

	asked [Global + 2]counts // by distance; the last is the object store

	mu    sync.Mutex
	down  map[string]time.Time // nodes that did not answer, until when they are left out
	files map[chunk.ID]found   // what Files said lately; at most maxFound
}

type counts struct{ chunks, bytes atomic.Int64 }

type found struct {
	path  string
	until time.Time
}

const (
	downTime   = 30 * time.Second // for which a node that does not answer is left out
	foundTime  = 10 * time.Second
	maxFound   = 256
	askTimeout = 2 * time.Minute // for one chunk over a slow link, with what it waits for there
	window     = 16              // chunks under way for one file
)

// New returns a fetcher; Use gives it the way to others.
func New(cfg Config) *Fetcher {
	return &Fetcher{cfg: cfg, down: make(map[string]time.Time), files: make(map[chunk.ID]found)}
}

// Use sets the group whose nodes are asked, before anything is fetched.
func (f *Fetcher) Use(g *peer.Group) { f.group = g }

// self is this node.
func (f *Fetcher) self() Node { return Node{f.group.ID(), f.group.Site()} }

// peers returns those that are not left out.
func (f *Fetcher) peers(now time.Time) (list []Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.group.List() {
		if until, down := f.down[p.ID]; !down || now.After(until) {
			delete(f.down, p.ID)
			list = append(list, Node{p.ID, p.Site})
		}
	}
	return list
}

// leaveOut has a node not asked for a while.
func (f *Fetcher) leaveOut(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down[id] = time.Now().Add(downTime)
}

// node returns a source by its ID.
func (f *Fetcher) node(id string) Node {
	if id == f.group.ID() {
		return f.self()
	}
	for _, p := range f.group.List() {
		if p.ID == id {
			return Node{p.ID, p.Site}
		}
	}
	return Node{ID: id}
}

// Get returns a chunk of a file that the source has. Nobody may change what it returns.
func (f *Fetcher) Get(ctx context.Context, source string, p Piece) ([]byte, error) {
	return f.get(ctx, source, p, Wanted)
}

// Once is Get for a piece that is kept by the caller, and in no cache here.
func (f *Fetcher) Once(ctx context.Context, source string, p Piece) ([]byte, error) {
	if data, ok := f.local(p); ok {
		return data, nil
	}
	ctx, stop := context.WithTimeout(ctx, askTimeout)
	defer stop()
	return f.origin(ctx, source, p, Wanted)
}

func (f *Fetcher) get(ctx context.Context, source string, p Piece, stage Stage) ([]byte, error) {
	if data, ok := f.local(p); ok {
		return data, nil
	}
	return f.cfg.Cache.Get(ctx, p.ID, func(ctx context.Context, _ chunk.ID) ([]byte, error) {
		ctx, stop := context.WithTimeout(ctx, askTimeout)
		defer stop()
		return f.origin(ctx, source, p, stage)
	})
}

// origin asks whom Next says, and the source itself should that one fail.
func (f *Fetcher) origin(ctx context.Context, source string, p Piece, stage Stage) ([]byte, error) {
	from := f.node(source)
	if next, then := Next(f.self(), f.peers(time.Now()), from, p.ID, stage); next.ID != source {
		data, err := f.ask(ctx, next, source, p, then)
		if err == nil || ctx.Err() != nil {
			return data, err
		}
		if sandbox.Is(err, sandbox.Unavailable) || sandbox.Is(err, sandbox.Timeout) {
			f.leaveOut(next.ID)
		}
		f.cfg.Log.Debug("a node has no chunk for the others", "node", next.ID, "error", err)
	}
	if source == Store {
		return f.fromStore(ctx, p)
	}
	return f.ask(ctx, from, source, p, ForRegion)
}

func (f *Fetcher) fromStore(ctx context.Context, p Piece) ([]byte, error) {
	if f.cfg.Store == nil {
		return nil, sandbox.Errorf("fetch.Get", sandbox.Unsupported, p.ID.String(), "this node has no object store").WithHint("give it one with `atoll up --store`")
	}
	data, err := f.cfg.Store.Get(ctx, p.ID)
	if err == nil {
		f.count(Global+1, len(data))
	}
	return data, err
}

func (f *Fetcher) count(d Distance, bytes int) {
	f.asked[d].chunks.Add(1)
	f.asked[d].bytes.Add(int64(bytes))
}

// local reads a piece of a file that is here whole. It is compared with its name: the caller of another node does so anyway.
func (f *Fetcher) local(p Piece) ([]byte, bool) {
	path, ok := f.path(p.File)
	if !ok || p.Size < 1 || p.Size > chunk.MaxSize || p.At < 0 {
		return nil, false
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, false
	}
	defer file.Close()
	data := make([]byte, p.Size)
	if _, err := io.ReadFull(io.NewSectionReader(file, p.At, int64(p.Size)), data); err != nil || chunk.Sum(data) != p.ID {
		return nil, false
	}
	return data, true
}

// path is Files, remembered for a while: a file has many pieces.
func (f *Fetcher) path(digest chunk.ID) (string, bool) {
	now := time.Now()
	f.mu.Lock()
	known, ok := f.files[digest]
	f.mu.Unlock()
	if !ok || now.After(known.until) {
		known = found{until: now.Add(foundTime)}
		known.path, _ = f.cfg.Files(digest)
		f.mu.Lock()
		if len(f.files) >= maxFound {
			clear(f.files)
		}
		f.files[digest] = known
		f.mu.Unlock()
	}
	return known.path, known.path != ""
}

// Write writes a file that the source has, chunk by chunk in order, and tells report how many bytes are there. The caller
// compares the whole with its digest.
func (f *Fetcher) Write(ctx context.Context, w io.Writer, source string, part chunk.Part, report func(n int)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		data []byte
		err  error
	}
	coming := make(chan chan result, window)
	go func() {
		defer close(coming)
		at := int64(0)
		for _, ref := range part.Chunks {
			p := Piece{ID: ref.ID, File: part.Digest, At: at, Size: ref.Size}
			at += int64(ref.Size)
			one := make(chan result, 1)
			select {
			case coming <- one:
			case <-ctx.Done():
				return
			}
			go func() {
				data, err := f.Get(ctx, source, p)
				if err == nil && len(data) != p.Size {
					err = sandbox.Errorf("fetch.Get", sandbox.Invalid, p.ID.String(), "it has %d bytes, not %d", len(data), p.Size)
				}
				one <- result{data, err}
			}()
		}
	}()
	for one := range coming {
		r := <-one
		if r.err != nil {
			return r.err
		}
		if _, err := w.Write(r.data); err != nil {
			return err
		}
		report(len(r.data))
	}
	return ctx.Err()
}
