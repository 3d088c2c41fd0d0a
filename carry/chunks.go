package carry

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// A pull by chunks, not by a delta, is for what this node has no older version of, when other nodes are nearer than the one
// that is asked: who pulls the same at the same time exchanges chunks, and who has the whole gives it (package fetch).

const (
	describePath = "/carry/v1/descriptions"
	cutPath      = "/carry/v1/parts"
	bareSize     = 1 << 20 // bytes of a file that is worth it
	keptParts    = 64
)

// serveDescribe answers with the offer of something.
func (c *Carrier) serveDescribe(w http.ResponseWriter, r *http.Request) {
	var req pullRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&req); err != nil {
		peer.Fail(w, sandbox.E("carry.Describe", sandbox.Invalid, "", err))
		return
	}
	it, err := c.find(r.Context(), req.Kind, req.Ref)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	peer.Answer(w, it.offer)
}

// servePart answers of which chunks a file of this node consists.
func (c *Carrier) servePart(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Part"
	digest, err := chunk.ParseID(r.URL.Query().Get("file"))
	if err != nil {
		peer.Fail(w, err)
		return
	}
	p := c.known.part(digest)
	if p == nil {
		path, ok := c.held()[digest]
		if !ok {
			peer.Fail(w, sandbox.Errorf(op, sandbox.NotFound, digest.String(), "the file is not here"))
			return
		}
		if p, err = cutFile(r.Context(), path); err != nil {
			peer.Fail(w, fail(op, digest.String(), sandbox.Internal, err))
			return
		}
		c.known.putPart(digest, p)
	}
	peer.Answer(w, p)
}

// cutFile returns the chunks of a file.
func cutFile(ctx context.Context, path string) (*chunk.Part, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := chunk.Cut("", f, func(chunk.ID, []byte) error { return ctx.Err() })
	return &p, err
}

// pullNear pulls by chunks. done is false when a delta is better.
func (c *Carrier) pullNear(ctx context.Context, kind Kind, ref string, p peer.Peer, report func(Progress)) (res Result, done bool, err error) {
	if !c.fetch.Neighbours(p.ID) {
		return res, false, nil
	}
	l, err := c.group.Link(ctx, p)
	if err != nil {
		return res, false, nil // the other way has its own means, and says what is wrong
	}
	var o offer
	if err := l.Call(ctx, http.MethodPost, describePath, pullRequest{kind, ref}, &o); err != nil {
		return res, false, err
	}
	if err := o.check(); err != nil {
		return res, false, sandbox.E("carry.Pull", sandbox.Invalid, ref, err)
	}
	if have, err := c.have(o); err != nil || have {
		return Result{ID: o.ID, Size: o.size(), Held: o.size()}, true, err
	}
	s := c.newSession(c.group.ID(), o)
	defer s.close()
	bare := false
	for i, t := range s.terms {
		bare = bare || !t.Held && t.Base == nil && o.Files[i].Size >= bareSize
	}
	if !bare {
		return res, false, nil
	}
	parts := make([]chunk.Part, len(o.Files))
	for i, t := range s.terms {
		if t.Held {
			continue
		}
		if err := l.Call(ctx, http.MethodGet, cutPath+"?file="+o.Files[i].Digest.String(), nil, &parts[i]); err != nil {
			return res, false, err
		}
	}
	res, err = c.receive(ctx, s, parts, c.fetch.Nearest(ctx, p.ID, digests(o)), report)
	return res, true, err
}

func digests(o offer) []chunk.ID {
	out := make([]chunk.ID, len(o.Files))
	for i, f := range o.Files {
		out[i] = f.Digest
	}
	return out
}

// size is the bytes of all files.
func (o offer) size() (n int64) {
	for _, f := range o.Files {
		n += f.Size
	}
	return n
}

// receive makes what was offered of the chunks that its files consist of, each from its source.
func (c *Carrier) receive(ctx context.Context, s *session, parts []chunk.Part, sources []string, report func(Progress)) (Result, error) {
	const op = "carry.Pull"
	began := time.Now()
	o := s.offer
	res := Result{ID: o.ID, Size: o.size()}
	if err := c.room(s); err != nil {
		return res, err
	}
	var got atomic.Int64
	before := c.received()
	last := began
	err := c.rebuild(ctx, s, func(ctx context.Context, i int, path string) error {
		p := parts[i]
		if p.Digest != o.Files[i].Digest || p.Size != o.Files[i].Size || !sound(p) {
			return sandbox.Errorf(op, sandbox.Invalid, o.Files[i].Name, "its chunks are those of another file")
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fail(op, o.Files[i].Name, diskKind(err), err)
		}
		err = c.fetch.Write(ctx, f, sources[i], p, func(n int) {
			if got.Add(int64(n)); report != nil && time.Since(last) > reportAt {
				last = time.Now()
				report(Progress{Stage: "fetching", Done: got.Load(), Total: res.Size, Wire: c.received() - before})
			}
		})
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return fail(op, o.Files[i].Name, diskKind(err), err)
		}
		res.Files = append(res.Files, FileResult{Name: o.Files[i].Name, Size: p.Size, Method: "chunks"})
		return nil
	})
	if have, _ := c.have(o); have {
		err = nil // it came another way meanwhile
	}
	for i, t := range s.terms {
		if t.Held {
			res.Held += o.Files[i].Size
		}
	}
	res.Wire, res.Took = c.received()-before, time.Since(began)
	return res, err
}

// received is how many bytes the node has fetched from elsewhere so far, for whatever.
func (c *Carrier) received() (n int64) {
	for _, s := range c.fetch.Stats() {
		n += s.Bytes
	}
	return n
}

// sound reports whether a part's chunks are those that Cut makes of so many bytes.
func sound(p chunk.Part) bool { return cutInto(p, chunk.CutSize) }

// cutInto reports whether a part's chunks are all of a size, but for the last.
func cutInto(p chunk.Part, size int64) bool {
	left := p.Size
	for _, ref := range p.Chunks {
		if int64(ref.Size) != min(left, size) || ref.Size <= 0 {
			return false
		}
		left -= int64(ref.Size)
	}
	return left == 0
}
