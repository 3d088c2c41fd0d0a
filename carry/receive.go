package carry

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
	"github.com/atoll-run/atoll/transfer"
)

const (
	maxSessions = 64
	sessionLife = time.Hour      // without a call
	stagedLife  = 24 * time.Hour // of chunks whose push did not go on
	maxMissing  = 1 << 16        // names in one question
)

// session is one push to this node.
type session struct {
	id    string
	from  string // the peer's ID
	offer offer
	terms []term
	here  []string // path of a held file
	bases []*os.File
	trees []*transfer.Tree // of files that were rebuilt

	mu   sync.Mutex // held while it is committed
	used time.Time  // guarded by Carrier.mu
}

func (s *session) close() {
	for _, f := range s.bases {
		if f != nil {
			_ = f.Close()
		}
	}
}

// serveOffer answers what is to be sent.
func (c *Carrier) serveOffer(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Offer"
	var o offer
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxOffer)).Decode(&o); err != nil {
		peer.Fail(w, sandbox.E(op, sandbox.Invalid, "", err))
		return
	}
	if err := o.check(); err != nil {
		peer.Fail(w, sandbox.E(op, sandbox.Invalid, o.ID, err))
		return
	}
	_, t, err := c.consider(r.Context(), o)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	peer.Answer(w, t)
}

// consider finds out what is to be sent of an offer that makes sense; there is a session unless the whole is here.
func (c *Carrier) consider(ctx context.Context, o offer) (*session, terms, error) {
	have, err := c.have(o)
	if err != nil || have {
		return nil, terms{Have: have}, err
	}
	s := c.newSession(peer.From(ctx).ID, o)
	err = c.room(s)
	if err == nil {
		err = c.keep(s)
	}
	if err != nil {
		s.close()
		return nil, terms{}, err
	}
	return s, terms{Session: s.id, Staged: c.cfg.Stage.Used() > 0, Files: s.terms}, nil
}

// have reports whether what is offered is here, and fails when it cannot be taken.
func (c *Carrier) have(o offer) (bool, error) {
	switch o.Kind {
	case Snapshot:
		m, err := o.snapshot()
		if err != nil {
			return false, err
		}
		if _, err := c.cfg.Snapshots.Get(m.ID); err == nil {
			return true, nil
		}
		return false, nil
	case Model:
		m, err := o.model()
		if err != nil {
			return false, err
		}
		return c.haveModel(m)
	default:
		i, err := o.image()
		if err != nil {
			return false, err
		}
		mine, err := c.cfg.Images.Get(i.ID)
		if err != nil {
			return false, nil
		}
		for _, name := range i.Names {
			if !slices.Contains(mine.Names, name) {
				return false, nil
			}
		}
		return c.cfg.Images.Holds(mine.Root.Digest), nil
	}
}

// snapshot is the manifest in an offer, whose files are those that are offered.
func (o offer) snapshot() (snapshot.Manifest, error) {
	const op = "carry.Offer"
	m, err := snapshot.Decode(o.Meta)
	if err == nil {
		err = node.Portable(m)
	}
	if err == nil && (m.ID != o.ID || len(o.Files) != len(m.Files)+1 || o.Files[0].Name != rootName || named(o.Files[0].Digest) != m.Spec.Root.Digest) {
		err = errors.New("the files are not those of its manifest")
	}
	for i := range m.Files {
		f := m.Files[i]
		if err == nil {
			want := o.Files[i+1]
			if want.Name != statePrefix+f.Name || want.Size != f.Size || named(want.Digest) != f.Digest {
				err = errors.New("the files are not those of its manifest")
			}
		}
	}
	if err != nil {
		return m, fail(op, o.ID, sandbox.Invalid, err)
	}
	return m, nil
}

// image is the record in an offer.
func (o offer) image() (image.Image, error) {
	var i image.Image
	err := json.Unmarshal(o.Meta, &i)
	if err == nil && (i.ID != o.ID || len(o.Files) != 1 || o.Files[0].Name != rootName || named(o.Files[0].Digest) != i.Root.Digest ||
		i.Root.Kind != sandbox.RootEROFS || len(i.Names) == 0) {
		err = errors.New("the file is not that of its record")
	}
	if err != nil {
		return i, sandbox.E("carry.Offer", sandbox.Invalid, o.ID, err)
	}
	return i, nil
}

// newSession finds out what is here of an offer. Bases are opened, so that they stay when their snapshots are removed.
func (c *Carrier) newSession(from string, o offer) *session {
	s := &session{id: sandbox.NewID(), from: from, offer: o, terms: make([]term, len(o.Files)), here: make([]string, len(o.Files)), bases: make([]*os.File, len(o.Files)),
		trees: make([]*transfer.Tree, len(o.Files))}
	held := c.held()
	for i, f := range o.Files {
		if path, ok := held[f.Digest]; ok {
			if info, err := os.Stat(path); err == nil && info.Size() == f.Size {
				s.terms[i].Held, s.here[i] = true, path
				continue
			}
		}
		for _, b := range f.Bases {
			path, ok := held[b]
			if !ok {
				continue
			}
			if opened, err := os.Open(path); err == nil {
				s.terms[i].Base, s.bases[i] = &b, opened
				break
			}
		}
	}
	return s
}

// room fails with Exhausted when what is to come does not fit: the files, and half as much for chunks on their way.
func (c *Carrier) room(s *session) error {
	var need int64
	for i, f := range s.offer.Files {
		if !s.terms[i].Held {
			need += f.Size
		}
	}
	var st unix.Statfs_t
	dir := filepath.Dir(c.cfg.Snapshots.Dir("x"))
	for ; unix.Statfs(dir, &st) != nil && dir != "/"; dir = filepath.Dir(dir) {
	}
	if free := int64(st.Bavail) * st.Bsize; free < need/2*3 {
		return sandbox.Errorf("carry.Offer", sandbox.Exhausted, s.offer.ID, "%d bytes are to come, and %d are free on the receiving node", need, free)
	}
	return nil
}

// keep adds a session and drops those that are forgotten.
func (c *Carrier) keep(s *session) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for id, old := range c.sessions {
		if now.Sub(old.used) > sessionLife {
			delete(c.sessions, id)
			old.close()
		}
	}
	if len(c.sessions) >= maxSessions {
		return sandbox.Errorf("carry.Offer", sandbox.Exhausted, s.offer.ID, "%d things are on their way here already", len(c.sessions))
	}
	s.used = now
	c.sessions[s.id] = s
	return nil
}

// session finds the session of a request, which must be its peer's.
func (c *Carrier) session(r *http.Request) (*session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.sessions[r.PathValue("id")]
	if s == nil || s.from != peer.From(r.Context()).ID {
		// It passes: the sender offers again.
		return nil, sandbox.Errorf("carry.Session", sandbox.Unavailable, r.PathValue("id"), "the receiving node has started anew")
	}
	s.used = time.Now()
	return s, nil
}

// serveMissing answers which chunks are not here.
func (c *Carrier) serveMissing(w http.ResponseWriter, r *http.Request) {
	if _, err := c.session(r); err != nil {
		peer.Fail(w, err)
		return
	}
	var ids []chunk.ID
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxMissing*70)).Decode(&ids)
	if err != nil || len(ids) > maxMissing {
		peer.Fail(w, sandbox.Errorf("carry.Missing", sandbox.Invalid, "", "not a list of chunks"))
		return
	}
	missing, err := c.cfg.Stage.Missing(r.Context(), ids)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	peer.Answer(w, missing)
}

// serveChunk takes one chunk.
func (c *Carrier) serveChunk(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Chunk"
	if _, err := c.session(r); err != nil {
		peer.Fail(w, err)
		return
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, cutSize))
	if err != nil {
		peer.Fail(w, sandbox.E(op, sandbox.Unavailable, r.PathValue("chunk"), err))
		return
	}
	if id, err := chunk.ParseID(r.PathValue("chunk")); err != nil || chunk.Sum(data) != id {
		peer.Fail(w, sandbox.Errorf(op, sandbox.Unavailable, r.PathValue("chunk"), "the chunk was damaged on its way"))
		return
	}
	if _, err := c.cfg.Stage.Put(r.Context(), data); err != nil {
		peer.Fail(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// serveCommit takes the manifest, rebuilds the files and makes the whole visible.
func (c *Carrier) serveCommit(w http.ResponseWriter, r *http.Request) {
	s, err := c.session(r)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := c.readCommit(r)
	var parts []*chunk.Part
	if err == nil {
		parts, err = s.parts(m)
	}
	if err == nil {
		err = c.rebuild(r.Context(), s, func(ctx context.Context, i int, path string) error {
			return c.decode(ctx, s, i, chunk.NewReader(ctx, c.cfg.Stage, *parts[i]), path)
		})
	}
	if !c.settle(w, s, err) {
		return
	}
	c.finish(s, m)
	w.WriteHeader(http.StatusNoContent)
}

// settle answers with what went wrong, if anything did, and reports whether all is well.
func (c *Carrier) settle(w http.ResponseWriter, s *session, err error) bool {
	if err == nil {
		return true
	}
	if have, _ := c.have(s.offer); have {
		return true // it came another way meanwhile
	}
	c.cfg.Log.Warn("a push failed at its end", "kind", s.offer.Kind, "id", s.offer.ID, "error", err)
	peer.Fail(w, err)
	return false
}

// readCommit reads the manifest and stages the chunks that come with it.
func (c *Carrier) readCommit(r *http.Request) (chunk.Manifest, error) {
	const op = "carry.Commit"
	body := bufio.NewReader(r.Body)
	text, err := readSized(body, chunk.MaxSize)
	if err != nil {
		return chunk.Manifest{}, fail(op, "", sandbox.Unavailable, err)
	}
	m, err := chunk.Decode(text)
	if err != nil {
		return m, err
	}
	n, err := binary.ReadUvarint(body)
	if err != nil || n > 2*inline {
		return m, sandbox.Errorf(op, sandbox.Unavailable, "", "the manifest was cut off")
	}
	for range n {
		data, err := readSized(body, cutSize)
		if err != nil {
			return m, fail(op, "", sandbox.Unavailable, err)
		}
		if _, err := c.cfg.Stage.Put(r.Context(), data); err != nil {
			return m, err
		}
	}
	var all []chunk.ID
	for _, p := range m.Parts {
		for _, ref := range p.Chunks {
			all = append(all, ref.ID)
		}
	}
	missing, err := c.cfg.Stage.Missing(r.Context(), all)
	if err == nil && len(missing) > 0 {
		err = sandbox.Errorf(op, sandbox.Unavailable, "", "%d chunks are missing", len(missing)) // it passes: the sender goes on
	}
	return m, err
}

// readSized reads a run of bytes after its length.
func readSized(r *bufio.Reader, limit int) ([]byte, error) {
	n, err := binary.ReadUvarint(r)
	if err != nil {
		return nil, err
	}
	if n > uint64(limit) {
		return nil, sandbox.Errorf("carry.Commit", sandbox.Invalid, "", "%d bytes are more than %d", n, limit)
	}
	p := make([]byte, n)
	_, err = io.ReadFull(r, p)
	return p, err
}

// parts returns those of a manifest by the file that they are of.
func (s *session) parts(m chunk.Manifest) ([]*chunk.Part, error) {
	parts := make([]*chunk.Part, len(s.offer.Files))
	next := 0
	for i := range s.offer.Files {
		if s.terms[i].Held {
			continue
		}
		if next == len(m.Parts) || m.Parts[next].Name != fmt.Sprintf("%05d", i) {
			return nil, sandbox.Errorf("carry.Commit", sandbox.Invalid, s.offer.ID, "the manifest is about other files")
		}
		parts[i] = &m.Parts[next]
		next++
	}
	if next != len(m.Parts) {
		return nil, sandbox.Errorf("carry.Commit", sandbox.Invalid, s.offer.ID, "the manifest is about more files")
	}
	return parts, nil
}

// finish forgets a session and its chunks.
func (c *Carrier) finish(s *session, m chunk.Manifest) {
	c.mu.Lock()
	delete(c.sessions, s.id)
	alone := true
	for _, other := range c.sessions {
		alone = alone && other.offer.ID == s.offer.ID // such a one finds that everything is here
	}
	c.mu.Unlock()
	s.close()
	for i, t := range s.trees {
		if t != nil { // and the file was compared with its digest
			c.known.putTree(s.offer.Files[i].Digest, t)
		}
	}
	if !alone {
		return // another push may count on the same chunks: Sweep removes them
	}
	for _, p := range m.Parts {
		for _, ref := range p.Chunks {
			if err := c.cfg.Stage.Delete(context.Background(), ref.ID); err != nil {
				c.cfg.Log.Warn("removing a chunk that has arrived", "error", err)
			}
		}
	}
}

// Sweep removes chunks of pushes that did not go on.
func (c *Carrier) Sweep(ctx context.Context, now time.Time) error {
	c.mu.Lock()
	busy := len(c.sessions) > 0
	c.mu.Unlock()
	if busy {
		return nil
	}
	return c.cfg.Stage.Each(ctx, func(e chunk.Entry) error {
		if now.Sub(e.Written) < stagedLife {
			return nil
		}
		return c.cfg.Stage.Delete(ctx, e.ID)
	})
}
