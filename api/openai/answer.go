package openai

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/host"
)

// piece is what choice number index has more of.
type piece struct {
	index int
	engine.Piece
}

// generation is one request under way at a local model: as many streams as there
// are choices.
type generation struct {
	model   *host.Model
	streams []*engine.Stream
}

// generate submits the choices. The caller closes the generation.
func generate(ctx context.Context, m *host.Model, requests []engine.Request) (*generation, error) {
	g := &generation{model: m}
	for _, r := range requests {
		s, err := m.Engine.Submit(ctx, r)
		if err != nil {
			g.close()
			return nil, err
		}
		g.streams = append(g.streams, s)
	}
	return g, nil
}

func (g *generation) close() {
	for _, s := range g.streams {
		s.Close()
	}
}

// each hands all pieces of all choices to f, as they come, until all have ended or
// one fails.
func (g *generation) each(ctx context.Context, f func(piece) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type arrival struct {
		piece
		err error
	}
	arrivals := make(chan arrival)
	for i, s := range g.streams {
		go func() {
			for {
				p, err := s.Next(ctx)
				select {
				case arrivals <- arrival{piece{i, p}, err}:
				case <-ctx.Done():
					return
				}
				if err != nil || p.Finish != "" {
					return
				}
			}
		}()
	}
	for open := len(g.streams); open > 0; {
		select {
		case a := <-arrivals:
			if a.err != nil {
				return a.err
			}
			if a.Finish != "" {
				open--
			}
			if err := f(a.piece); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (g *generation) usage() usage {
	var u usage
	for _, s := range g.streams {
		u.add(s.Usage())
	}
	return u
}

// head is what all answers to completions begin with.
type head struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	Model   string `json:"model"`
}

func newHead(prefix, object, model string) head {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return head{prefix + hex.EncodeToString(b[:]), object, time.Now().Unix(), model}
}

// newSeed is for requests that bring none.
func newSeed() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:])
	return binary.LittleEndian.Uint64(b[:])
}

// events writes server-sent events.
type events struct {
	w       http.ResponseWriter
	control *http.ResponseController
	begun   bool
}

// sendTimeout bounds how long a client may take no bytes of a stream.
const sendTimeout = time.Minute

func newEvents(w http.ResponseWriter) *events {
	return &events{w: w, control: http.NewResponseController(w)}
}

func (e *events) send(v any) error {
	data, err := marshal(v)
	if err != nil {
		return err
	}
	return e.raw(data)
}

func (e *events) raw(data []byte) error {
	if !e.begun {
		h := e.w.Header()
		h.Set("Content-Type", "text/event-stream; charset=utf-8")
		h.Set("Cache-Control", "no-cache")
		h.Set("X-Accel-Buffering", "no") // proxies must not hold events back
		e.begun = true
	}
	_ = e.control.SetWriteDeadline(time.Now().Add(sendTimeout)) // a writer without deadlines has a server with none
	if _, err := e.w.Write(append(append([]byte("data: "), data...), "\n\n"...)); err != nil {
		return err
	}
	return e.control.Flush()
}

// end closes the stream: with the last event, or with an error that came too late
// for a status.
func (a *api) end(e *events, w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case err == nil:
		_ = e.raw([]byte("[DONE]"))
	case !e.begun:
		a.fail(w, r, err)
	case r.Context().Err() == nil:
		_ = e.send(toAPIError(err))
	}
	_ = e.control.SetWriteDeadline(time.Time{})
}

func marshal(v any) ([]byte, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return []byte(strings.TrimSuffix(b.String(), "\n")), nil
}

// probs tells the probabilities of tokens.
func probs(m *host.Model, tokens []engine.Token) []tokenProb {
	one := func(id int32, p float32) topProb {
		text := m.Tokens.Bytes(id)
		if text == "" {
			text = m.Tokens.Name(id)
		}
		bytes := make([]int, len(text))
		for i := range len(text) {
			bytes[i] = int(text[i])
		}
		return topProb{strings.ToValidUTF8(text, "\uFFFD"), max(p, -9999), bytes}
	}
	out := make([]tokenProb, len(tokens))
	for i, t := range tokens {
		out[i] = tokenProb{one(t.ID, t.LogProb), []topProb{}}
		for _, l := range t.Likely {
			out[i].Top = append(out[i].Top, one(l.Token, l.LogProb))
		}
	}
	return out
}
