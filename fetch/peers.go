package fetch

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	chunkPath   = "/fetch/v1/chunks/"
	holdersPath = "/fetch/v1/holders"

	holdersTimeout = 10 * time.Second // for which nodes of the region are asked what they have; slower ones are left out
	maxHolders     = 4096             // digests in one question
	maxEnvelope    = chunk.MaxSize + 1<<10
)

// Handle answers other nodes.
func (f *Fetcher) Handle(mux *http.ServeMux) {
	mux.HandleFunc("GET "+chunkPath+"{id}", f.serveChunk)
	mux.HandleFunc("POST "+holdersPath, f.serveHolders)
	mux.HandleFunc("POST "+runsPath, f.serveRun)
}

// ask gets a chunk from a node, packed as suits its content, the link and that node's processor.
func (f *Fetcher) ask(ctx context.Context, n Node, source string, p Piece, stage Stage) ([]byte, error) {
	known, err := f.group.Find(n.ID)
	if err != nil {
		return nil, err
	}
	l, err := f.group.Link(ctx, known)
	if err != nil {
		return nil, err
	}
	q := url.Values{"file": {p.File.String()}, "at": {strconv.FormatInt(p.At, 10)}, "size": {strconv.Itoa(p.Size)}, "source": {source},
		"stage": {strconv.Itoa(int(stage))}, "link": {strconv.FormatInt(int64(f.cfg.Meter.Link().Bandwidth), 10)}}
	began := time.Now()
	resp, err := l.Do(ctx, http.MethodGet, chunkPath+p.ID.String()+"?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	envelope, err := io.ReadAll(io.LimitReader(resp.Body, maxEnvelope))
	if err != nil {
		return nil, sandbox.E("fetch.Get", sandbox.Unavailable, n.ID, err)
	}
	distance := Between(f.group.Site(), n.Site)
	if distance == Global && p.Size >= chunk.CutSize { // how long a small piece takes says little of the link
		f.cfg.Meter.Sent(int64(len(envelope)), began)
	}
	f.count(distance, len(envelope))
	return chunk.Open(envelope, p.ID)
}

// serveChunk gives a chunk: of a file that is here, or fetched on behalf of others.
func (f *Fetcher) serveChunk(w http.ResponseWriter, r *http.Request) {
	const op = "fetch.Chunk"
	q := r.URL.Query()
	id, err := chunk.ParseID(r.PathValue("id"))
	file, err2 := chunk.ParseID(q.Get("file"))
	at, err3 := strconv.ParseInt(q.Get("at"), 10, 64)
	size, err4 := strconv.Atoi(q.Get("size"))
	stage, err5 := strconv.Atoi(q.Get("stage"))
	for _, e := range []error{err, err2, err3, err4, err5} {
		if e != nil {
			peer.Fail(w, sandbox.E(op, sandbox.Invalid, r.PathValue("id"), e))
			return
		}
	}
	p, source := Piece{ID: id, File: file, At: at, Size: size}, q.Get("source")
	var data []byte
	if source == f.group.ID() || Stage(stage) <= Wanted {
		var ok bool
		if data, ok = f.local(p); !ok {
			peer.Fail(w, sandbox.Errorf(op, sandbox.NotFound, id.String(), "the file is not here"))
			return
		}
	} else if data, err = f.get(r.Context(), source, p, Stage(stage)); err != nil {
		peer.Fail(w, err)
		return
	}
	link, _ := strconv.ParseFloat(q.Get("link"), 64) // none: the default is meant
	envelope, err := f.pack(data, pack.Link{Bandwidth: link})
	if err == nil {
		err = f.cfg.Pacer.Wait(r.Context(), pace.Migration, len(envelope))
	}
	if err != nil {
		peer.Fail(w, sandbox.E(op, "", id.String(), err))
		return
	}
	_, _ = w.Write(envelope) // a node that has gone asks again
}

// pack makes a chunk's envelope for a link, and measures the processor by it.
func (f *Fetcher) pack(data []byte, link pack.Link) ([]byte, error) {
	plan := pack.Choose(pack.Look(data), link, f.cfg.Meter.CPU(1))
	began := time.Now()
	envelope, err := pack.Append(nil, data, nil, plan)
	f.cfg.Meter.Worked(plan, int64(len(data)), time.Since(began))
	return envelope, err
}

// Nearest returns which node each of the files is best fetched from: one of the region that has it whole, the nearest first, or
// the source. Nodes of the region that do not answer soon are left out from then on.
func (f *Fetcher) Nearest(ctx context.Context, source string, files []chunk.ID) []string {
	out := slices.Repeat([]string{source}, len(files))
	self, far := f.self(), Between(f.group.Site(), f.node(source).Site)
	near := slices.DeleteFunc(f.peers(time.Now()), func(n Node) bool { return n.ID == source || Between(self.Site, n.Site) >= far })
	slices.SortFunc(near, func(a, b Node) int { // of those that are equally near each node begins with another one
		if d := Between(self.Site, a.Site) - Between(self.Site, b.Site); d != 0 {
			return int(d)
		}
		if weight(a, chunk.Sum([]byte(self.ID))) > weight(b, chunk.Sum([]byte(self.ID))) {
			return -1
		}
		return 1
	})
	has := make([][]bool, len(near))
	ctx, stop := context.WithTimeout(ctx, holdersTimeout)
	defer stop()
	var wg sync.WaitGroup
	for i, n := range near {
		wg.Go(func() {
			var err error
			if has[i], err = f.holds(ctx, n, files); err != nil {
				f.leaveOut(n.ID)
				f.cfg.Log.Debug("a node of the region does not answer", "node", n.ID, "error", err)
			}
		})
	}
	wg.Wait()
	for i := range files {
		for j, n := range near {
			if len(has[j]) == len(files) && has[j][i] {
				out[i] = n.ID
				break
			}
		}
	}
	return out
}

func (f *Fetcher) holds(ctx context.Context, n Node, files []chunk.ID) (has []bool, err error) {
	known, err := f.group.Find(n.ID)
	if err != nil {
		return nil, err
	}
	l, err := f.group.Link(ctx, known)
	if err != nil {
		return nil, err
	}
	return has, l.Call(ctx, http.MethodPost, holdersPath, files, &has)
}

// serveHolders answers which files are here whole.
func (f *Fetcher) serveHolders(w http.ResponseWriter, r *http.Request) {
	var ids []chunk.ID
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxHolders*70))
	if err == nil {
		err = json.NewDecoder(bytes.NewReader(body)).Decode(&ids)
	}
	if err != nil || len(ids) > maxHolders {
		peer.Fail(w, sandbox.Errorf("fetch.Holders", sandbox.Invalid, "", "not a list of files"))
		return
	}
	has := make([]bool, len(ids))
	for i, id := range ids {
		_, has[i] = f.path(id)
	}
	peer.Answer(w, has)
}

// Neighbours reports whether there is a node that is nearer than the source, with which chunks can be exchanged.
func (f *Fetcher) Neighbours(source string) bool {
	self, far := f.self(), Between(f.group.Site(), f.node(source).Site)
	return slices.ContainsFunc(f.peers(time.Now()), func(n Node) bool { return n.ID != source && Between(self.Site, n.Site) < far })
}

// Stats is what came from one distance.
type Stats struct {
	From          string // "local", "regional", "global", "store"
	Chunks, Bytes int64  // bytes as they came, packed; from the store: of their content
}

// Stats returns what came from where since the fetcher was made.
func (f *Fetcher) Stats() []Stats {
	out := make([]Stats, len(f.asked))
	for d := range f.asked {
		out[d] = Stats{Store, f.asked[d].chunks.Load(), f.asked[d].bytes.Load()}
		if Distance(d) <= Global {
			out[d].From = Distance(d).String()
		}
	}
	return out
}
