package chunk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// Cut cuts what r gives into chunks of CutSize and returns the part of a manifest that they are. each gets every chunk, whose
// bytes it may keep.
func Cut(name string, r io.Reader, each func(id ID, data []byte) error) (Part, error) {
	p := Part{Name: name}
	whole := blake3.New()
	for {
		buf := make([]byte, CutSize)
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			_, _ = whole.Write(buf[:n]) // a hash does not fail
			id := Sum(buf[:n])
			if err := each(id, buf[:n]); err != nil {
				return Part{}, err
			}
			p.Chunks = append(p.Chunks, Ref{ID: id, Size: n})
			p.Size += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			whole.Sum(p.Digest[:0])
			return p, nil
		case err != nil:
			return Part{}, sandbox.E("chunk.Cut", "", name, err)
		}
	}
}

// writers is how many chunks of a part are put at once: object stores are far away.
const writers = 8

// WritePart cuts what r gives, puts the chunks under the lease and returns the part that they are.
func WritePart(ctx context.Context, l *Lease, name string, r io.Reader) (Part, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	slots := make(chan struct{}, writers)
	var wg sync.WaitGroup
	p, err := Cut(name, r, func(_ ID, data []byte) error {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		wg.Go(func() {
			defer func() { <-slots }()
			if _, err := l.Put(ctx, data); err != nil {
				cancel(err)
			}
		})
		return nil
	})
	wg.Wait()
	if why := context.Cause(ctx); why != nil {
		err = why
	}
	if err != nil {
		return Part{}, sandbox.E("chunk.WritePart", "", name, err)
	}
	return p, nil
}

// NewReader returns a reader of a part's content, chunk by chunk from a store. At the end it fails with Invalid, and not
// with io.EOF, when the whole does not have the part's digest.
func NewReader(ctx context.Context, s Store, p Part) io.Reader {
	return &partReader{ctx: ctx, store: s, part: p, whole: blake3.New()}
}

type partReader struct {
	ctx   context.Context
	store Store
	part  Part
	next  int // chunk
	rest  bytes.Reader
	whole *blake3.Hasher
}

func (r *partReader) Read(p []byte) (int, error) {
	const op = "chunk.Read"
	for r.rest.Len() == 0 {
		if r.next == len(r.part.Chunks) {
			var got ID
			r.whole.Sum(got[:0])
			if got != r.part.Digest {
				return 0, sandbox.Errorf(op, sandbox.Invalid, r.part.Name, "the whole has another digest than its manifest says")
			}
			return 0, io.EOF
		}
		ref := r.part.Chunks[r.next]
		data, err := r.store.Get(r.ctx, ref.ID)
		if err != nil {
			return 0, sandbox.E(op, "", r.part.Name, err)
		}
		if len(data) != ref.Size {
			return 0, sandbox.Errorf(op, sandbox.Invalid, r.part.Name, "chunk %s has %d bytes, its manifest says %d", ref.ID, len(data), ref.Size)
		}
		_, _ = r.whole.Write(data) // a hash does not fail
		r.rest.Reset(data)
		r.next++
	}
	return r.rest.Read(p)
}

// PutManifest puts a manifest under the lease.
func PutManifest(ctx context.Context, l *Lease, m Manifest) (ID, error) {
	b, err := m.Encode()
	if err != nil {
		return ID{}, err
	}
	return l.Put(ctx, b)
}

// GetManifest reads a manifest.
func GetManifest(ctx context.Context, s Store, id ID) (Manifest, error) {
	b, err := s.Get(ctx, id)
	if err != nil {
		return Manifest{}, err
	}
	m, err := Decode(b)
	if err != nil {
		return Manifest{}, sandbox.E("chunk.GetManifest", "", id.String(), err)
	}
	return m, nil
}

// maxLineage bounds how far a lineage is followed.
const maxLineage = 10_000

// Lineage returns a manifest and its ancestors, nearest first, as far as they are there. It ends at a loop, which no honest
// store can hold, and after 10,000.
func Lineage(ctx context.Context, s Store, id ID) ([]Manifest, error) {
	var chain []Manifest
	for seen := map[ID]bool{}; id != (ID{}) && !seen[id] && len(chain) < maxLineage; {
		seen[id] = true
		m, err := GetManifest(ctx, s, id)
		if len(chain) > 0 && sandbox.Is(err, sandbox.NotFound) {
			break
		}
		if err != nil {
			return nil, err
		}
		chain, id = append(chain, m), m.Parent
	}
	return chain, nil
}
