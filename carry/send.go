package carry

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/transfer"
)

const (
	cutSize  = 256 << 10 // bytes of a chunk under way: small enough that little is lost when a connection breaks
	inline   = 128 << 10 // bytes of chunks that travel with the manifest, which saves a round trip
	reportAt = 200 * time.Millisecond

	firstPause, lastPause = 100 * time.Millisecond, 15 * time.Second // between attempts
	warmSize              = 1 << 20                                  // bytes of files whose index is made ahead of the next push
	maxRetries            = 4                                        // of one chunk, before the attempt ends
)

// Push sends something to a peer and returns when it is visible there. What the peer has already is not sent, and not an
// error. report may be nil.
func (c *Carrier) Push(ctx context.Context, kind Kind, ref, to string, report func(Progress)) (Result, error) {
	if to == StoreName {
		return c.toStore(ctx, kind, ref, report)
	}
	p, err := c.group.Find(to)
	if err != nil {
		return Result{}, err
	}
	it, err := c.find(ctx, kind, ref)
	if err != nil {
		return Result{}, err
	}
	return c.push(ctx, it, func(ctx context.Context) (*peer.Link, error) { return c.group.Link(ctx, p) }, report)
}

// push tries until it is done, fails for a reason that will not pass, or nothing got through for as long as the carrier's
// patience.
func (c *Carrier) push(ctx context.Context, it *item, link func(context.Context) (*peer.Link, error), report func(Progress)) (Result, error) {
	began := time.Now()
	var wire, last int64
	moved := began // when something got through
	streamed := false
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		l, err := link(ctx)
		var res Result
		var s *sending
		if err == nil {
			s = &sending{c: c, it: it, link: l, report: report, began: began}
			s.wire.Store(wire)
			res, err = s.run(ctx, &streamed)
			wire = s.wire.Load()
		}
		if err == nil {
			res.Wire, res.Took = wire, time.Since(began)
			s.remember(res)
			return res, nil
		}
		if wire > last {
			last, moved, pause = wire, time.Now(), firstPause
		}
		if !sandbox.Is(err, sandbox.Unavailable) || time.Since(moved) > c.cfg.Patience {
			return Result{}, err
		}
		c.cfg.Log.Warn("a push was broken off and goes on", "kind", it.Kind, "id", it.ID, "error", err)
		if report != nil {
			report(Progress{Stage: "sending", Total: it.size(), Wire: wire, Waiting: err.Error()})
		}
		select {
		case <-ctx.Done():
			return Result{}, sandbox.E("carry.Push", "", it.ID, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// sending is one attempt of a push.
type sending struct {
	c      *Carrier
	it     *item
	link   *peer.Link
	report func(Progress)
	began  time.Time
	terms  terms

	wire atomic.Int64 // bytes that the other end has taken, earlier attempts' included
	done atomic.Int64 // bytes of files that are dealt with
	read atomic.Int64 // how far the present file is read

	held    []heldChunk // chunks that may yet travel with the manifest
	holding int         // bytes of these
	group   uploads
}

func (s *sending) path(rest string) string { return "/carry/v1/sessions/" + s.terms.Session + rest }

// run sends the item, in a stream unless one was tried before.
func (s *sending) run(ctx context.Context, streamed *bool) (Result, error) {
	res := Result{ID: s.it.ID, Size: s.it.size()}
	stop := s.watch()
	defer stop()
	if a, ok := s.assume(); ok && !*streamed {
		*streamed = true
		if done, err := s.stream(ctx, a, &res); done || err != nil {
			return res, err
		}
		s.read.Store(0)
		s.done.Store(0)
		for i, t := range s.terms.Files { // what was wrong is not assumed again
			if b := a.Terms[i].Base; b != nil && !t.equal(a.Terms[i]) {
				s.c.known.note(s.link.Peer.ID, *b, false)
			}
		}
	}
	if s.terms.Session == "" {
		if err := s.link.Call(ctx, http.MethodPost, "/carry/v1/offers", s.it.offer, &s.terms); err != nil {
			return res, err
		}
	}
	if s.terms.Have {
		res.Held = res.Size
		return res, nil
	}
	if len(s.terms.Files) != len(s.it.Files) {
		return res, sandbox.Errorf("carry.Push", sandbox.Unavailable, s.it.ID, "the node answers about other files")
	}
	for i, t := range s.terms.Files {
		s.c.known.note(s.link.Peer.ID, s.it.Files[i].Digest, t.Held)
	}
	m := chunk.Manifest{Kind: "delta", Created: time.Unix(0, 0)}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.group.start(cancel, 4*s.link.Flows())
	for i, f := range s.it.Files {
		s.read.Store(0)
		if s.terms.Files[i].Held {
			res.Held += f.Size
		} else {
			part, fr, err := s.file(ctx, i)
			if err != nil {
				s.group.wait()
				return res, s.cause(ctx, err)
			}
			m.Parts, res.Files = append(m.Parts, part), append(res.Files, fr)
		}
		s.read.Store(0)
		s.done.Add(f.Size)
	}
	s.group.wait()
	if err := context.Cause(ctx); err != nil {
		return res, s.cause(ctx, err)
	}
	return res, s.commit(ctx, m)
}

// cause is why ctx ended, if it did: an upload that failed is why encoding was broken off, and not the other way round.
func (s *sending) cause(ctx context.Context, err error) error {
	if why := context.Cause(ctx); why != nil {
		err = why
	}
	return fail("carry.Push", s.it.ID, sandbox.Internal, err)
}

// remember notes what the peer has now, and prepares for the next version of it.
func (s *sending) remember(res Result) {
	for i, f := range s.it.Files {
		s.c.known.note(s.link.Peer.ID, f.Digest, true)
		j := slices.IndexFunc(res.Files, func(r FileResult) bool { return r.Name == f.Name })
		if j < 0 {
			continue
		}
		s.c.known.took(f.Digest, res.Files[j])
		if f.Size >= warmSize {
			s.c.known.warm(s.c.life, f.Digest, s.it.paths[i])
		}
	}
}

// file sends one file as a delta in chunks.
func (s *sending) file(ctx context.Context, i int) (chunk.Part, FileResult, error) {
	cut := &cutter{s: s, ctx: ctx, whole: blake3.New(), part: chunk.Part{Name: fmt.Sprintf("%05d", i)}}
	fr, err := s.encode(ctx, i, nil, cut)
	if err == nil {
		err = cut.flush()
	}
	cut.whole.Sum(cut.part.Digest[:0])
	return cut.part, fr, err
}

// encode writes one file's delta. It fails with errTooMuch when that is predicted to take more bytes than limit, from which it
// is subtracted, unless that is nil.
func (s *sending) encode(ctx context.Context, i int, limit *int64, w io.Writer) (FileResult, error) {
	f, base := s.it.Files[i], s.terms.Files[i].Base
	fr := FileResult{Name: f.Name, Size: f.Size}
	next, closeNext, err := transfer.OpenImage(s.it.paths[i])
	if err != nil {
		return fr, sandbox.E("carry.Push", sandbox.NotFound, f.Name, err)
	}
	defer closeNext.Close()
	var old transfer.Image
	if base != nil {
		path, ok := s.it.bases[*base]
		if !ok {
			return fr, sandbox.Errorf("carry.Push", sandbox.Unavailable, f.Name, "the node asks for a base that was not offered")
		}
		image, closeOld, err := transfer.OpenImage(path)
		if err == nil {
			defer closeOld.Close()
			old = image
		} // else it was removed since: everything is sent
	}
	o, predicted, err := s.options(ctx, base, old, next, limit != nil)
	if err != nil {
		return fr, err
	}
	if limit != nil {
		if *limit -= predicted; *limit < 0 {
			return fr, errTooMuch
		}
	}
	next.At = &counted{next.At, &s.read}
	stats, err := transfer.Encode(ctx, w, old, next, o)
	fr.Wire, fr.Method = stats.Written, stats.Method.String()
	return fr, err
}

// options chooses the method and returns how many bytes it is predicted to make: by a sample of the file, on the link as it was
// measured last. What is streamed, and so given up when it becomes much more, is sent as the version before it was; a sample
// takes as long as a quarter of the rest.
func (s *sending) options(ctx context.Context, base *chunk.ID, old, next transfer.Image, streamed bool) (transfer.Options, int64, error) {
	if old.At == nil {
		return transfer.Options{Method: transfer.Whole}, next.Size, nil
	}
	index, err := s.c.known.index(ctx, *base, old)
	if err != nil {
		return transfer.Options{}, 0, err
	}
	if f, ok := s.c.known.foretell(*base); ok && streamed {
		return transfer.Options{Method: f.method, Index: index}, f.bytes, nil
	}
	sample, err := transfer.Sample(ctx, old, next, index)
	if err != nil {
		return transfer.Options{}, 0, err
	}
	link := transfer.Link{Bandwidth: s.c.meter.Link().Bandwidth}
	best := transfer.Predict(sample, link, transfer.DefaultMachine(cores()))[0]
	o := transfer.Options{Method: best.Method, Index: index}
	if o.Method == transfer.Whole {
		o.Index = nil
	}
	return o, best.Bytes, nil
}

// counted tells how far an image is read.
type counted struct {
	io.ReaderAt
	far *atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(p, off)
	for end := off + int64(n); ; {
		far := c.far.Load()
		if end <= far || c.far.CompareAndSwap(far, end) {
			return n, err
		}
	}
}

// commit sends the manifest and the chunks that were kept back, and has everything rebuilt.
func (s *sending) commit(ctx context.Context, m chunk.Manifest) error {
	text, err := m.Encode()
	if err != nil {
		return err
	}
	body := binary.AppendUvarint(nil, uint64(len(text)))
	body = append(body, text...)
	body = binary.AppendUvarint(body, uint64(len(s.held)))
	for _, h := range s.held {
		body = binary.AppendUvarint(body, uint64(len(h.data)))
		body = append(body, h.data...)
	}
	if err := s.c.cfg.Pacer.Wait(ctx, pace.Migration, len(body)); err != nil {
		return err
	}
	resp, err := s.link.Do(ctx, http.MethodPost, s.path("/commit"), bytes.NewReader(body))
	if err != nil {
		return err
	}
	s.wire.Add(int64(len(body)))
	return resp.Body.Close()
}

// watch reports now and then until the returned function is called.
func (s *sending) watch() func() {
	if s.report == nil {
		return func() {}
	}
	total, stop := s.it.size(), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(reportAt)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			p := Progress{Stage: "sending", Done: min(s.done.Load()+s.read.Load(), total), Total: total, Wire: s.wire.Load()}
			if took := time.Since(s.began); p.Done > total/50 && took > time.Second {
				p.Left = time.Duration(float64(took) * float64(total-p.Done) / float64(p.Done)).Round(time.Second)
			}
			s.report(p)
		}
	})
	return func() {
		close(stop)
		wg.Wait()
	}
}
