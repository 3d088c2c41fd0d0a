package native

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// ndjson is the form of every stream: one JSON value a line, blank lines to
// keep the connection alive.
const ndjson = "application/x-ndjson"

// heartbeat is how often a quiet stream says that it lives, so that proxies do
// not cut it and a vanished client is noticed.
const heartbeat = 15 * time.Second

// frame is one line of a stream that ends with a result or a problem.
type frame[P, R any] struct {
	Progress *P       `json:"progress,omitempty"`
	Result   *R       `json:"result,omitempty"`
	Problem  *Problem `json:"problem,omitempty"`
}

// lineWriter writes JSON lines, each flushed, from several goroutines.
type lineWriter struct {
	mu sync.Mutex
	w  http.ResponseWriter
	rc *http.ResponseController
}

func newLineWriter(w http.ResponseWriter) *lineWriter {
	w.Header().Set("Content-Type", ndjson)
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	l := &lineWriter{w: w, rc: http.NewResponseController(w)}
	_ = l.rc.Flush() // the headers tell the client that the request was accepted
	return l
}

func (l *lineWriter) write(v any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := json.NewEncoder(l.w).Encode(v); err != nil {
		return err
	}
	return l.rc.Flush()
}

func (l *lineWriter) beat() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := io.WriteString(l.w, "\n"); err != nil {
		return err
	}
	return l.rc.Flush()
}

// serveProgress runs work and streams what it reports, then how it ended. A
// client that no longer reads cancels the work.
func serveProgress[P, R any](ctx context.Context, w http.ResponseWriter, work func(ctx context.Context, report func(P)) (R, error)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lines := newLineWriter(w)
	done := make(chan struct{})
	var beats sync.WaitGroup
	beats.Go(func() {
		tick := time.NewTicker(heartbeat)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if lines.beat() != nil {
					cancel()
				}
			}
		}
	})
	result, err := work(ctx, func(p P) {
		if lines.write(frame[P, R]{Progress: &p}) != nil {
			cancel()
		}
	})
	close(done)
	beats.Wait()
	last := frame[P, R]{Result: &result}
	if err != nil {
		p := ProblemOf(err)
		last = frame[P, R]{Problem: &p}
	}
	_ = lines.write(last) // the client may have gone
}

// readProgress is the other end of serveProgress. report may be nil.
func readProgress[P, R any](op string, body io.Reader, report func(P)) (R, error) {
	var none R
	for dec := json.NewDecoder(body); ; {
		var f frame[P, R]
		switch err := dec.Decode(&f); {
		case errors.Is(err, io.EOF):
			return none, sandbox.Errorf(op, sandbox.Unavailable, "", "the daemon hung up before it was done").
				WithHint("look at the daemon's log")
		case err != nil:
			return none, sandbox.E(op, kindOfTransport(err), "", err)
		case f.Problem != nil:
			return none, f.Problem.Err()
		case f.Result != nil:
			return *f.Result, nil
		case f.Progress != nil && report != nil:
			report(*f.Progress)
		}
	}
}

// serveEvents streams values from a channel until it closes or the client goes.
func serveEvents[T any](ctx context.Context, w http.ResponseWriter, events <-chan T) {
	lines := newLineWriter(w)
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			err = lines.beat()
		case e, ok := <-events:
			if !ok {
				return
			}
			err = lines.write(e)
		}
		if err != nil {
			return
		}
	}
}

// kindOfTransport tells a caller that gave up from a daemon that is gone.
func kindOfTransport(err error) sandbox.Kind {
	switch {
	case errors.Is(err, context.Canceled):
		return sandbox.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return sandbox.Timeout
	}
	return sandbox.Unavailable
}

// stream answers with what produce writes. An error before the first byte is
// an ordinary answer; one after it breaks the connection off, so that a client
// never takes a part for the whole.
func (c *call) stream(contentType string, produce func(http.ResponseWriter) error) error {
	w := &lateWriter{ResponseWriter: c.w, contentType: contentType}
	err := produce(w)
	if err != nil && w.begun {
		panic(http.ErrAbortHandler)
	}
	if err == nil && !w.begun {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(http.StatusOK)
	}
	return err
}

// lateWriter sets the content type with the first byte and not before.
type lateWriter struct {
	http.ResponseWriter
	contentType string
	begun       bool
}

func (l *lateWriter) Write(p []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.Header().Set("Content-Type", l.contentType)
	}
	return l.ResponseWriter.Write(p)
}
