package carry

import (
	"bytes"
	"context"
	"net/http"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/sandbox"
)

type heldChunk struct {
	id   chunk.ID
	data []byte
}

// cutter cuts a delta into chunks and sees that they are sent.
type cutter struct {
	s     *sending
	ctx   context.Context
	part  chunk.Part
	whole *blake3.Hasher
	buf   []byte
}

func (c *cutter) Write(p []byte) (int, error) {
	n := len(p)
	_, _ = c.whole.Write(p) // a hash does not fail
	for len(p) > 0 {
		if c.buf == nil {
			c.buf = make([]byte, 0, cutSize)
		}
		k := min(len(p), cutSize-len(c.buf))
		c.buf, p = append(c.buf, p[:k]...), p[k:]
		if len(c.buf) == cutSize {
			if err := c.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (c *cutter) flush() error {
	if len(c.buf) == 0 {
		return nil
	}
	data := c.buf
	c.buf = nil // the upload has it now
	id := chunk.Sum(data)
	c.part.Chunks = append(c.part.Chunks, chunk.Ref{ID: id, Size: len(data)})
	c.part.Size += int64(len(data))
	return c.s.offerChunk(c.ctx, heldChunk{id, data})
}

// offerChunk keeps the first chunks back, and sends them once they are too many to travel with the manifest.
func (s *sending) offerChunk(ctx context.Context, h heldChunk) error {
	s.held, s.holding = append(s.held, h), s.holding+len(h.data)
	if s.holding <= inline {
		return nil
	}
	batch := s.held
	s.held = nil // holding stays: from here on nothing is kept back
	if s.terms.Staged {
		lacking, err := s.lacking(ctx, batch)
		if err != nil {
			return err
		}
		batch = lacking
	}
	for _, h := range batch {
		if err := s.group.run(ctx, func() error { return s.upload(ctx, h) }); err != nil {
			return err
		}
	}
	return nil
}

// lacking returns which chunks the other end does not have from an earlier attempt.
func (s *sending) lacking(ctx context.Context, batch []heldChunk) ([]heldChunk, error) {
	ids := make([]chunk.ID, len(batch))
	for i, h := range batch {
		ids[i] = h.id
	}
	var missing []chunk.ID
	if err := s.link.Call(ctx, http.MethodPost, s.path("/missing"), ids, &missing); err != nil {
		return nil, err
	}
	want := make(map[chunk.ID]bool, len(missing))
	for _, id := range missing {
		want[id] = true
	}
	var out []heldChunk
	for _, h := range batch {
		if want[h.id] {
			out = append(out, h)
		}
	}
	return out, nil
}

func (s *sending) upload(ctx context.Context, h heldChunk) error {
	if err := s.c.cfg.Pacer.Wait(ctx, pace.Migration, len(h.data)); err != nil {
		return err
	}
	began := time.Now()
	resp, err := s.link.Do(ctx, http.MethodPut, s.path("/chunks/"+h.id.String()), bytes.NewReader(h.data))
	for range maxRetries { // one connection of several may be lost
		if !sandbox.Is(err, sandbox.Unavailable) || s.link.Flows() == 0 || ctx.Err() != nil {
			break
		}
		resp, err = s.link.Do(ctx, http.MethodPut, s.path("/chunks/"+h.id.String()), bytes.NewReader(h.data))
	}
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	s.wire.Add(int64(len(h.data)))
	s.c.meter.Sent(int64(len(h.data)), began)
	return nil
}
