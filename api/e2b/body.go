package e2b

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"
)

const (
	maxBody  = 1 << 20          // bytes of a JSON body
	maxDrain = 64 << 20         // bytes beyond that are still taken, so that the client reads our answer
	bodyTime = 30 * time.Second // for a client to send it
)

// decode reads a JSON body into v and reports whether the handler may go on;
// otherwise it has answered. Unknown fields are ignored, since newer clients
// send more than we know; an absent body leaves v as it is.
func (a *api) decode(w http.ResponseWriter, r *http.Request, v any) bool {
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTime)) // unsupported only in tests
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var big *http.MaxBytesError
	if errors.As(err, &big) {
		// A connection that is closed with bytes unread is reset.
		_, _ = io.CopyN(io.Discard, r.Body, maxDrain)
	}
	_ = control.SetReadDeadline(time.Time{})
	switch {
	case errors.As(err, &big):
		writeJSON(w, http.StatusRequestEntityTooLarge, apiError{Code: http.StatusRequestEntityTooLarge, Message: "the body is larger than 1 MiB"})
		return false
	case err != nil:
		a.reject(w, r, "the body could not be read: %v", err)
		return false
	case len(body) == 0:
		return true
	}
	if err := json.Unmarshal(body, v); err != nil {
		a.reject(w, r, "the body is not what it should be: %v", err)
		return false
	}
	return true
}

// maxTimeout is the longest life that can be asked for, in seconds: a year.
const maxTimeout = 365 * 24 * 3600

// life turns a number of seconds into a duration. Zero means "now": the node's
// own zero would mean "for ever", which E2B's API cannot say.
func life(seconds int64) (time.Duration, error) {
	if seconds < 0 || seconds > maxTimeout {
		return 0, invalid("timeout must be between 0 and %d seconds", maxTimeout)
	}
	return max(time.Duration(seconds)*time.Second, time.Millisecond), nil
}

// valueOr is *p, or fallback when p is nil.
func valueOr[T any](p *T, fallback T) T {
	if p == nil {
		return fallback
	}
	return *p
}
