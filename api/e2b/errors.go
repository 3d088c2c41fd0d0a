package e2b

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/atoll-run/atoll/sandbox"
)

// apiError is the body of every failed REST call. The SDKs choose their error
// class by code, so it always equals the HTTP status.
type apiError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// statusOf maps a kind of error to the HTTP status that E2B uses for it.
func statusOf(kind sandbox.Kind) int {
	switch kind {
	case sandbox.Invalid, sandbox.Exists, sandbox.Unsupported:
		return http.StatusBadRequest
	case sandbox.NotFound:
		return http.StatusNotFound
	case sandbox.Conflict:
		return http.StatusConflict
	case sandbox.Denied:
		return http.StatusForbidden
	case sandbox.Exhausted:
		return http.StatusTooManyRequests
	case sandbox.Unavailable:
		return http.StatusServiceUnavailable
	case sandbox.Timeout:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// toAPIError renders err for a client. What went wrong inside the node is said
// only for errors that the client can act on; a defect stays in the log.
func toAPIError(err error) apiError {
	kind := sandbox.KindOf(err)
	e := apiError{Code: statusOf(kind), Message: messageOf(err)}
	if kind == sandbox.Internal {
		e.Message = "internal error"
	}
	return e
}

// messageOf is err without the name of our operation, which means nothing to
// the user of an SDK, and with the hint, which does.
func messageOf(err error) string {
	var e *sandbox.Err
	if !errors.As(err, &e) {
		return err.Error()
	}
	msg := string(e.Kind)
	if e.Err != nil {
		msg = messageOf(e.Err)
	}
	if e.Subject != "" {
		msg = e.Subject + ": " + msg
	}
	if e.Hint != "" {
		msg += " (" + e.Hint + ")"
	}
	return msg
}

// fail answers with err and notes it for the request log.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	if rec := recordOf(r.Context()); rec != nil {
		rec.err = err
	}
	e := toAPIError(err)
	if e.Code == http.StatusTooManyRequests || e.Code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1") // seconds
	}
	writeJSON(w, e.Code, e)
}

// reject answers a request that makes no sense.
func (a *api) reject(w http.ResponseWriter, r *http.Request, format string, args ...any) {
	a.fail(w, r, invalid(format, args...))
}

func invalid(format string, args ...any) error {
	return sandbox.Errorf("e2b", sandbox.Invalid, "", format, args...)
}

func notFound(format string, args ...any) error {
	return sandbox.Errorf("e2b", sandbox.NotFound, "", format, args...)
}

// writeJSON answers with v. A client that has gone away is no error.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil { // our own types always marshal
		status, body = http.StatusInternalServerError, []byte(`{"code":500,"message":"internal error"}`)
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
