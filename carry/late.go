package carry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// A snapshot can be restored while it comes. All of it but the pages of its memory is pulled first. Then it is lent to the
// runtime (snapshot.Lend), whose machines say which pages they need (package arrive): first those that restores before needed
// first, as was learned on the node that it comes from. Those are fetched before the others, of which all come in the end, and
// the snapshot is one like all others. When the other node is gone for too long, its machines end with that reason, and nothing
// is left of it.

const (
	finePath   = "/carry/v1/pieces"
	besidePath = "/carry/v1/beside"
	lateSize   = 32 << 20 // bytes of a file that is worth it; smaller ones may have to be there before a machine starts
	maxBeside  = 1 << 20  // bytes of a file beside a snapshot
	// maxDescribe is of how many files at once it is asked of which pieces they consist.
	maxDescribe = 16
	// latePatience bounds for how long nothing may come.
	latePatience = 2 * time.Minute
	latePause    = 500 * time.Millisecond // before a piece is asked for again
)

// serveFine answers of which pieces a file of this node consists.
func (c *Carrier) serveFine(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Pieces"
	digest, err := chunk.ParseID(r.URL.Query().Get("file"))
	if err != nil {
		peer.Fail(w, err)
		return
	}
	key := chunk.Sum(append([]byte("pieces of "), digest[:]...))
	p := c.known.part(key)
	if p == nil {
		path, ok := c.held()[digest]
		if !ok {
			peer.Fail(w, sandbox.Errorf(op, sandbox.NotFound, digest.String(), "the file is not here"))
			return
		}
		if p, err = pieces(r.Context(), path); err != nil {
			peer.Fail(w, fail(op, digest.String(), sandbox.Internal, err))
			return
		}
		c.known.putPart(key, p)
	}
	peer.Answer(w, p)
}

// pieces cuts a file as package arrive brings it.
func pieces(ctx context.Context, path string) (*chunk.Part, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, whole, buf := &chunk.Part{}, blake3.New(), make([]byte, arrive.PieceSize)
	for ctx.Err() == nil {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			_, _ = whole.Write(buf[:n]) // a hash does not fail
			p.Chunks = append(p.Chunks, chunk.Ref{ID: chunk.Sum(buf[:n]), Size: n})
			p.Size += int64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			whole.Sum(p.Digest[:0])
			return p, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, ctx.Err()
}

// serveBeside answers with a file that a runtime left beside a snapshot.
func (c *Carrier) serveBeside(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Beside"
	id, name := r.URL.Query().Get("snapshot"), r.URL.Query().Get("name")
	m, err := c.cfg.Snapshots.Get(id)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	if !slices.Contains(c.capabilities(m).Beside, name) {
		peer.Fail(w, sandbox.Errorf(op, sandbox.Invalid, id, "%.80q is no file beside it", name))
		return
	}
	data, err := readSmall(filepath.Join(c.cfg.Snapshots.Dir(id), name))
	if errors.Is(err, os.ErrNotExist) {
		err = sandbox.E(op, sandbox.NotFound, id, err)
	}
	if err != nil {
		peer.Fail(w, fail(op, id, sandbox.Internal, err))
		return
	}
	_, _ = w.Write(data) // the peer may have gone
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxBeside))
}

// capabilities are those of a snapshot's runtime here; none where that is missing.
func (c *Carrier) capabilities(m snapshot.Manifest) sandbox.Capabilities {
	r, err := c.cfg.Node.Runtime(m.Runtime)
	if err != nil {
		return sandbox.Capabilities{}
	}
	return r.Capabilities()
}

// PullLate has a peer's snapshot here for restores as soon as what these wait for has come; the rest comes behind, after it has
// returned. Where nothing of it can come late it is Pull. report may be nil.
func (c *Carrier) PullLate(ctx context.Context, ref, from string, report func(Progress)) (Result, error) {
	const op = "carry.Pull"
	if from == StoreName {
		return c.fromStore(ctx, Snapshot, ref, report)
	}
	p, err := c.group.Find(from)
	if err != nil {
		return Result{}, err
	}
	l, err := c.group.Link(ctx, p)
	if err != nil {
		return c.Pull(ctx, Snapshot, ref, from, report) // it has means of its own
	}
	var o offer
	if err := l.Call(ctx, http.MethodPost, describePath, pullRequest{Snapshot, ref}, &o); err != nil {
		return Result{}, err
	}
	if err := o.check(); err != nil {
		return Result{}, sandbox.E(op, sandbox.Invalid, ref, err)
	}
	if have, err := c.have(o); err != nil || have {
		return Result{ID: o.ID, Size: o.size(), Held: o.size()}, err
	}
	m, err := o.snapshot()
	if err != nil {
		return Result{}, err
	}
	if slices.ContainsFunc(c.cfg.Snapshots.Lent(), func(lent snapshot.Manifest) bool { return lent.ID == m.ID }) {
		return Result{ID: o.ID, Size: o.size()}, nil // it is on its way
	}
	s := c.newSession(c.group.ID(), o)
	defer s.close()
	caps := c.capabilities(m)
	late := s.late(caps.Late)
	if len(late) == 0 {
		return c.Pull(ctx, Snapshot, ref, from, report)
	}
	if err := c.room(s); err != nil {
		return Result{}, err
	}
	j := &journey{c: c, from: p.ID, session: s, manifest: m, beside: caps.Beside, began: time.Now(), late: late, before: c.received()}
	return j.start(ctx, l, report)
}

// late returns the numbers of files that may come late: by patterns, and not here.
func (s *session) late(patterns []string) (list []int) {
	for i, f := range s.offer.Files[1:] {
		name := f.Name[len(statePrefix):]
		fits := slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, name); return ok })
		if fits && !s.terms[i+1].Held && f.Size >= lateSize {
			list = append(list, i+1)
		}
	}
	return list
}

// journey is a snapshot on its way here.
type journey struct {
	c        *Carrier
	from     string // the peer's ID
	session  *session
	manifest snapshot.Manifest
	beside   []string
	late     []int // of the offer's files
	began    time.Time
	before   int64 // bytes that had been fetched before it

	draft *snapshot.Draft
	wants *arrive.Wants
	queue *queue
}

// start pulls what restores wait for, lends the snapshot and goes on by itself.
func (j *journey) start(ctx context.Context, l *peer.Link, report func(Progress)) (Result, error) {
	o := j.session.offer
	res := Result{ID: o.ID, Size: o.size()}
	for i, t := range j.session.terms {
		if t.Held {
			res.Held += o.Files[i].Size
		}
	}
	parts, beside, err := j.describe(ctx, l)
	if err != nil {
		return res, err
	}
	if j.draft, err = j.c.cfg.Snapshots.Receive(o.ID); err != nil {
		return res, err
	}
	j.queue = newQueue()
	lent := false
	err = j.fill(ctx, parts, beside, report)
	if err == nil {
		err = j.c.cfg.Images.Receive(ctx, j.manifest.Spec.Root.Digest, j.session.fillRoot(func(ctx context.Context, i int, path string) error {
			return j.fetch(ctx, parts[i], path)
		}), func(root sandbox.Root) error {
			local, err := node.Localize(j.manifest, root)
			if err == nil {
				err = j.draft.Lend(local)
			}
			lent = err == nil
			return err
		})
	}
	if err == nil {
		j.wants, err = arrive.Make(j.draft.Dir)
	}
	if err != nil {
		end := j.draft.Abort
		if lent {
			end = j.draft.Withdraw
		}
		return res, errors.Join(err, j.queue.close(), end())
	}
	go j.run(context.WithoutCancel(ctx))
	res.Wire, res.Took = j.c.received()-j.before, time.Since(j.began)
	return res, nil
}

// describe asks of which pieces the files consist that are not here, and for what lies beside them, all at once: each question is a
// round trip.
func (j *journey) describe(ctx context.Context, l *peer.Link) (parts []chunk.Part, beside [][]byte, err error) {
	o := j.session.offer
	parts, beside = make([]chunk.Part, len(o.Files)), make([][]byte, len(j.beside))
	errs := make([]error, len(o.Files))
	var wg sync.WaitGroup
	turns := make(chan struct{}, maxDescribe)
	for i, f := range o.Files {
		if j.session.terms[i].Held {
			continue
		}
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			p := &parts[i]
			errs[i] = l.Call(ctx, http.MethodGet, finePath+"?file="+f.Digest.String(), nil, p)
			if errs[i] == nil && (p.Digest != f.Digest || p.Size != f.Size || !cutInto(*p, arrive.PieceSize)) {
				errs[i] = sandbox.Errorf("carry.Pull", sandbox.Invalid, f.Name, "its pieces are those of another file")
			}
		})
	}
	for i, name := range j.beside { // hints: without them it is slower
		wg.Go(func() {
			resp, err := l.Do(ctx, http.MethodGet, besidePath+"?snapshot="+o.ID+"&name="+name, nil)
			if err != nil {
				return
			}
			defer resp.Body.Close()
			if data, err := io.ReadAll(io.LimitReader(resp.Body, maxBeside)); err == nil {
				beside[i] = data
			}
		})
	}
	wg.Wait()
	return parts, beside, errors.Join(errs...)
}

// fill makes the files of the state: those that may come late are empty as yet.
func (j *journey) fill(ctx context.Context, parts []chunk.Part, beside [][]byte, report func(Progress)) error {
	o := j.session.offer
	for i := 1; i < len(o.Files); i++ {
		err := j.session.state(ctx, i, func(ctx context.Context, i int, path string) error {
			if !slices.Contains(j.late, i) {
				return j.fetch(ctx, parts[i], path)
			}
			f, err := arrive.Create(path, o.Files[i].Size)
			if err != nil {
				return fail("carry.Pull", o.Files[i].Name, diskKind(err), err)
			}
			j.queue.add(o.Files[i].Name[len(statePrefix):], f, parts[i])
			return nil
		}, j.draft.Dir)
		if err != nil {
			return err
		}
		if report != nil {
			report(Progress{Stage: "fetching", Done: int64(i), Total: int64(len(o.Files)), Wire: j.c.received() - j.before})
		}
	}
	for i, name := range j.beside {
		if beside[i] == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(j.draft.Dir, filepath.Base(name)), beside[i], 0o600); err != nil {
			return fail("carry.Pull", name, diskKind(err), err)
		}
	}
	return nil
}

// fetch fetches a whole file.
func (j *journey) fetch(ctx context.Context, p chunk.Part, path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail("carry.Pull", filepath.Base(path), diskKind(err), err)
	}
	err = j.c.fetch.Write(ctx, f, j.from, p, func(int) {})
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fail("carry.Pull", filepath.Base(path), diskKind(err), err)
	}
	return nil
}
