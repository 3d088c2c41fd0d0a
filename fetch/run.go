package fetch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	runsPath = "/fetch/v1/runs"
	maxRun   = 64       // pieces in one request
	runLimit = 16 << 10 // bytes of one request
)

// runRequest asks for pieces of files that the node has. The answer is their envelopes in this order, each after its length in
// bytes, 4 bytes little endian; it ends early before one that the node has not.
type runRequest struct {
	Pieces []runPiece `json:"pieces"`
	Link   float64    `json:"link"` // bytes per second; 0: the default is meant
}

type runPiece struct {
	ID   chunk.ID `json:"id"`
	File chunk.ID `json:"file"`
	At   int64    `json:"at"`
	Size int      `json:"size"`
}

// Run gets pieces by one request, for a caller that keeps them, and hands each to got when it comes, in their order. It returns how
// many came. Where other nodes are nearer than the source it gets none, since each piece is to be asked for where it is nearest.
func (f *Fetcher) Run(ctx context.Context, source string, pieces []Piece, got func(i int, data []byte) error) (n int, err error) {
	const op = "fetch.Run"
	if source == Store || f.Neighbours(source) || len(pieces) > maxRun {
		return 0, nil
	}
	ctx, stop := context.WithTimeout(ctx, askTimeout)
	defer stop()
	known, err := f.group.Find(source)
	if err != nil {
		return 0, err
	}
	l, err := f.group.Link(ctx, known)
	if err != nil {
		return 0, err
	}
	req := runRequest{Link: f.cfg.Meter.Link().Bandwidth}
	for _, p := range pieces {
		req.Pieces = append(req.Pieces, runPiece(p))
	}
	body, err := json.Marshal(req)
	if err != nil {
		return 0, sandbox.E(op, sandbox.Internal, source, err)
	}
	resp, err := l.Do(ctx, http.MethodPost, runsPath, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	for i, p := range pieces {
		envelope, err := readEnvelope(in)
		if err != nil {
			return i, sandbox.E(op, sandbox.Unavailable, source, err)
		}
		f.count(Between(f.group.Site(), known.Site), len(envelope))
		data, err := chunk.Open(envelope, p.ID)
		if err == nil && len(data) != p.Size {
			err = sandbox.Errorf(op, sandbox.Invalid, p.ID.String(), "it has %d bytes, not %d", len(data), p.Size)
		}
		if err == nil {
			err = got(i, data)
		}
		if err != nil {
			return i, err
		}
	}
	return len(pieces), nil
}

// readEnvelope reads one envelope of an answer.
func readEnvelope(in io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxEnvelope {
		return nil, errors.New("an envelope is larger than any chunk")
	}
	// What is claimed is not made before it comes.
	envelope, err := io.ReadAll(io.LimitReader(in, int64(n)))
	if err == nil && len(envelope) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	return envelope, err
}

// serveRun gives pieces of files that are here.
func (f *Fetcher) serveRun(w http.ResponseWriter, r *http.Request) {
	var req runRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, runLimit)).Decode(&req)
	if err != nil || len(req.Pieces) > maxRun {
		peer.Fail(w, sandbox.Errorf("fetch.Run", sandbox.Invalid, "", "not a list of pieces"))
		return
	}
	flush := http.NewResponseController(w)
	for i, p := range req.Pieces {
		data, ok := f.local(Piece(p))
		if !ok {
			if i == 0 {
				peer.Fail(w, sandbox.Errorf("fetch.Run", sandbox.NotFound, p.ID.String(), "the file is not here"))
			}
			return
		}
		envelope, err := f.pack(data, pack.Link{Bandwidth: req.Link})
		if err == nil {
			err = f.cfg.Pacer.Wait(r.Context(), pace.Migration, len(envelope))
		}
		if err == nil {
			_, err = w.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(envelope))), envelope...))
		}
		if err == nil {
			err = flush.Flush() // pieces are used one by one
		}
		if err != nil {
			return // a node that has gone asks again
		}
	}
}
