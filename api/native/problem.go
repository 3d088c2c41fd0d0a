package native

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/atoll-run/atoll/sandbox"
)

// Problem is an error as the API answers it: RFC 9457's members, and ours that
// let a client rebuild the *sandbox.Err.
type Problem struct {
	Title   string       `json:"title"`
	Status  int          `json:"status"`
	Detail  string       `json:"detail"` // the innermost cause, without operation or hint
	Kind    sandbox.Kind `json:"kind"`
	Op      string       `json:"op,omitempty"`      // the outermost operation
	Subject string       `json:"subject,omitempty"` // the innermost subject
	Hint    string       `json:"hint,omitempty"`
}

// statusOf maps every kind to the HTTP status that says it best.
var statusOf = map[sandbox.Kind]int{
	sandbox.Invalid:     http.StatusBadRequest,
	sandbox.NotFound:    http.StatusNotFound,
	sandbox.Exists:      http.StatusConflict,
	sandbox.Conflict:    http.StatusConflict,
	sandbox.Unsupported: http.StatusNotImplemented,
	sandbox.Denied:      http.StatusForbidden,
	sandbox.Exhausted:   http.StatusTooManyRequests,
	sandbox.Unavailable: http.StatusServiceUnavailable,
	sandbox.Timeout:     http.StatusGatewayTimeout,
	sandbox.Canceled:    499, // as nginx says "client closed request"
	sandbox.Internal:    http.StatusInternalServerError,
}

// ProblemOf says what an error means to a client: err is not nil.
func ProblemOf(err error) Problem {
	p := Problem{Kind: sandbox.KindOf(err), Hint: sandbox.HintOf(err), Detail: err.Error()}
	for rest := err; ; {
		var e *sandbox.Err
		if !errors.As(rest, &e) {
			break
		}
		if p.Op == "" {
			p.Op = e.Op
		}
		if e.Subject != "" {
			p.Subject = e.Subject
		}
		if e.Err == nil {
			p.Detail = sandbox.E("", e.Kind, "", nil).Error()[len(": "):]
			break
		}
		p.Detail, rest = e.Err.Error(), e.Err
	}
	p.Status = statusOf[p.Kind]
	if p.Status == 0 {
		p.Status = http.StatusInternalServerError
	}
	p.Title = http.StatusText(p.Status)
	if p.Title == "" {
		p.Title = string(p.Kind)
	}
	return p
}

// Err is the error that the problem stands for.
func (p Problem) Err() error {
	kind := p.Kind
	if kind == "" {
		kind = kindOfStatus(p.Status)
	}
	detail := p.Detail
	if detail == "" {
		detail = p.Title
	}
	return &sandbox.Err{Op: p.Op, Kind: kind, Subject: p.Subject, Err: errors.New(detail), Hint: p.Hint}
}

// kindOfStatus serves answers that did not come from this API, such as those of
// a proxy in between.
func kindOfStatus(status int) sandbox.Kind {
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return sandbox.Denied
	case status == http.StatusNotFound:
		return sandbox.NotFound
	case status == http.StatusConflict:
		return sandbox.Conflict
	case status == http.StatusBadGateway, status == http.StatusServiceUnavailable:
		return sandbox.Unavailable
	case status >= 400 && status < 500:
		return sandbox.Invalid
	}
	return sandbox.Internal
}

func writeProblem(w http.ResponseWriter, p Problem) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // the client may have gone; nothing is left to tell it
}

// maxProblem bounds how much of an error answer a client reads, in bytes.
const maxProblem = 64 << 10

// readProblem turns an error answer into an error, whoever wrote it.
func readProblem(op string, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	var p Problem
	if json.Unmarshal(body, &p) != nil || p.Detail == "" && p.Title == "" {
		p = Problem{Detail: "the daemon answered " + resp.Status}
	}
	if p.Status == 0 {
		p.Status = resp.StatusCode
	}
	if p.Op == "" {
		p.Op = op
	}
	return p.Err()
}
