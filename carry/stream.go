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
	"slices"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// A stream is a push in one request, for what is small and goes to a node whose files this one remembers: the offer, what the
// receiver is taken to have, and the deltas against that, while they are made. The receiver applies them while they come. So
// the whole takes one round trip. A receiver that has other files answers what it has instead, and the push goes on as others
// do; so does one whose connection breaks, since nothing of a stream is kept.
//
// Its body: a length (uvarint) and an assumption in JSON; then for each file that is not held, in the order of streamed, its
// delta in runs, each after its length (uvarint), the last one empty.

// assumption is an offer and what its receiver is taken to answer.
type assumption struct {
	Offer offer  `json:"offer"`
	Terms []term `json:"terms"`
}

const (
	streamPath = "/carry/v1/streams"
	// streamLimit is up to how many bytes are predicted to be sent in a stream; twice as many end it. More is worth being resumed.
	streamLimit = 4 << 20
	// streamAlone is the same where a single connection is slowed by each lost packet.
	streamAlone = inline
	// streamBare bounds the files without a base in a stream, in bytes.
	streamBare = 256 << 10
)

// errTooMuch ends a stream of which more came than was predicted.
var errTooMuch = errors.New("it is too much for one stream")

// assume returns what a peer has of the item, by what it said before; ok is false when too little is known for a stream.
func (s *sending) assume() (a assumption, ok bool) {
	has := s.c.known.of(s.link.Peer.ID)
	a.Offer = s.it.offer
	a.Offer.Files = slices.Clone(s.it.Files)
	for i := range a.Offer.Files {
		f, t := &a.Offer.Files[i], term{}
		if has(f.Digest) {
			t.Held = true
		} else if j := slices.IndexFunc(f.Bases, has); j >= 0 {
			base := f.Bases[j] // comes first, so that the receiver takes it if it is there
			f.Bases, t.Base = slices.Concat([]chunk.ID{base}, f.Bases[:j], f.Bases[j+1:]), &base
		} else if f.Size > streamBare {
			return a, false
		}
		a.Terms = append(a.Terms, t)
	}
	return a, s.it.Kind != Snapshot || a.Terms[0].Held // the root of a snapshot is rebuilt last: it goes another way
}

// stream sends the item in one request. done is false when it must go the other way: by the terms, if the receiver has
// answered with some.
func (s *sending) stream(ctx context.Context, a assumption, res *Result) (done bool, err error) {
	body, writer := io.Pipe()
	making, stop := context.WithCancel(ctx) // not the request's: an early answer is yet to be read when making ends
	defer stop()
	s.terms = terms{Files: a.Terms}
	made := make(chan error, 1)
	go func() {
		err := s.deltas(making, a, writer, res)
		_ = writer.CloseWithError(err)
		made <- err
	}()
	resp, err := s.link.Do(ctx, http.MethodPost, streamPath, body)
	_ = body.Close() // what answers early reads no more
	stop()
	failed := <-made
	switch {
	case err == nil:
		defer resp.Body.Close()
	case errors.Is(failed, errTooMuch):
		s.terms, res.Files, res.Held = terms{}, nil, 0
		return false, nil
	case failed != nil && !errors.Is(failed, io.ErrClosedPipe) && !errors.Is(failed, context.Canceled):
		return false, fail("carry.Push", s.it.ID, sandbox.Internal, failed)
	default:
		return false, err
	}
	s.terms = terms{}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxOffer)).Decode(&s.terms); err != nil {
		return false, sandbox.E("carry.Push", sandbox.Unavailable, s.it.ID, err)
	}
	if s.terms.Have {
		return true, nil
	}
	res.Files, res.Held = nil, 0
	if len(s.terms.Files) != len(s.it.Files) {
		return false, sandbox.Errorf("carry.Push", sandbox.Unavailable, s.it.ID, "the node answers about other files")
	}
	return false, nil
}

// deltas writes the body of a stream.
func (s *sending) deltas(ctx context.Context, a assumption, w io.Writer, res *Result) error {
	head, err := json.Marshal(a)
	if err != nil {
		return err
	}
	limit := int64(streamAlone)
	if s.link.Steady() {
		limit = streamLimit
	}
	if _, err := w.Write(append(binary.AppendUvarint(nil, uint64(len(head))), head...)); err != nil {
		return err
	}
	runs := &runWriter{ctx: ctx, s: s, w: w, room: 2 * limit} // predictions are not exact
	for i, f := range s.it.Files {
		if a.Terms[i].Held {
			res.Held += f.Size
			s.done.Add(f.Size)
			continue
		}
		fr, err := s.encode(ctx, i, &limit, runs)
		if err != nil {
			return err
		}
		if err := runs.end(); err != nil {
			return err
		}
		res.Files = append(res.Files, fr)
		s.read.Store(0)
		s.done.Add(f.Size)
	}
	return nil
}

// A runWriter writes each piece after its length, as long as there is room.
type runWriter struct {
	ctx  context.Context
	s    *sending
	w    io.Writer
	room int64 // bytes
}

func (r *runWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.room -= int64(len(p)); r.room < 0 {
		return 0, errTooMuch
	}
	if err := r.s.c.cfg.Pacer.Wait(r.ctx, pace.Migration, len(p)); err != nil {
		return 0, err
	}
	n, err := r.w.Write(append(binary.AppendUvarint(make([]byte, 0, len(p)+binary.MaxVarintLen64), uint64(len(p))), p...))
	r.s.wire.Add(int64(n))
	return min(n, len(p)), err
}

func (r *runWriter) end() error {
	_, err := r.w.Write([]byte{0})
	return err
}

// serveStream takes a push in one request.
func (c *Carrier) serveStream(w http.ResponseWriter, r *http.Request) {
	const op = "carry.Stream"
	body := bufio.NewReaderSize(r.Body, 64<<10)
	var a assumption
	head, err := readSized(body, maxOffer)
	if err == nil {
		err = json.Unmarshal(head, &a)
	}
	if err == nil {
		err = a.Offer.check()
	}
	if err != nil {
		peer.Fail(w, fail(op, a.Offer.ID, sandbox.Invalid, err))
		return
	}
	s, t, err := c.consider(r.Context(), a.Offer)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	if t.Have || !slices.EqualFunc(t.Files, a.Terms, term.equal) {
		peer.Answer(w, t)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err = c.rebuild(r.Context(), s, func(ctx context.Context, i int, path string) error {
		return c.decode(ctx, s, i, &runReader{in: body}, path)
	})
	if !c.settle(w, s, err) {
		c.drop(s)
		return
	}
	c.finish(s, chunk.Manifest{})
	peer.Answer(w, terms{Have: true})
}

// drop forgets a session that nobody can go on with.
func (c *Carrier) drop(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, s.id)
	s.close()
}

// equal reports whether two terms say the same.
func (t term) equal(o term) bool {
	return t.Held == o.Held && (t.Base == nil) == (o.Base == nil) && (t.Base == nil || *t.Base == *o.Base)
}

// A runReader reads the runs of one delta up to the empty one.
type runReader struct {
	in    *bufio.Reader
	left  int64 // of the run
	ended bool
}

func (r *runReader) Read(p []byte) (int, error) {
	if r.ended {
		return 0, io.EOF
	}
	if r.left == 0 {
		n, err := binary.ReadUvarint(r.in)
		if err != nil {
			return 0, cut(err)
		}
		if n > maxFile {
			return 0, fmt.Errorf("a run of %d bytes", n)
		}
		if r.left, r.ended = int64(n), n == 0; r.ended {
			return 0, io.EOF
		}
	}
	n, err := r.in.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, cut(err)
}

// cut says of a body that ends in the middle that it does.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
