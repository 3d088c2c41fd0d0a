package guest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"

	"connectrpc.com/connect"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// kinds maps Connect's codes to ours; what is not listed is Internal.
var kinds = map[connect.Code]sandbox.Kind{
	connect.CodeCanceled:           sandbox.Canceled,
	connect.CodeInvalidArgument:    sandbox.Invalid,
	connect.CodeOutOfRange:         sandbox.Invalid,
	connect.CodeDeadlineExceeded:   sandbox.Timeout,
	connect.CodeNotFound:           sandbox.NotFound,
	connect.CodeAlreadyExists:      sandbox.Exists,
	connect.CodePermissionDenied:   sandbox.Denied,
	connect.CodeUnauthenticated:    sandbox.Denied,
	connect.CodeResourceExhausted:  sandbox.Exhausted,
	connect.CodeFailedPrecondition: sandbox.Conflict,
	connect.CodeAborted:            sandbox.Conflict,
	connect.CodeUnimplemented:      sandbox.Unsupported,
	connect.CodeUnavailable:        sandbox.Unavailable,
}

// rpcError turns the error of a Connect call into ours; nil stays nil.
func rpcError(op, subject string, err error) error {
	if err == nil {
		return nil
	}
	var own *sandbox.Err
	if errors.As(err, &own) {
		return sandbox.E(op, own.Kind, subject, own) // from our Dial
	}
	var c *connect.Error
	if errors.As(err, &c) {
		if connect.IsWireError(err) {
			kind, known := kinds[c.Code()]
			if !known {
				kind = sandbox.Internal
			}
			return sandbox.E(op, kind, subject, errors.New(c.Message()))
		}
		// Not what the agent said but what happened on the way.
		switch c.Code() {
		case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeInternal, connect.CodeInvalidArgument, connect.CodeDataLoss:
			return sandbox.E(op, sandbox.Unavailable, subject, &cutError{c})
		}
		return sandbox.E(op, kinds[c.Code()], subject, c)
	}
	return transportError(op, err)
}

// cutError is a stream that was cut. That has many names in Connect, none of which
// helps a user.
type cutError struct{ cause error }

// Error implements error.
func (*cutError) Error() string { return "lost the connection to the sandbox" }

// Unwrap returns what Connect calls it.
func (e *cutError) Unwrap() error { return e.cause }

// transportError is for calls that got no answer.
func transportError(op string, err error) error {
	var own *sandbox.Err
	kind := sandbox.Unavailable
	switch {
	case errors.As(err, &own):
		kind = own.Kind
	case errors.Is(err, context.Canceled):
		kind = sandbox.Canceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		kind = sandbox.Timeout
	}
	return sandbox.E(op, kind, "", err)
}

// maxErrorBody bounds what is read of an answer that reports an error, in bytes.
const maxErrorBody = 64 << 10

// statusError turns the answer of a plain HTTP call into an error.
func statusError(op string, res *http.Response) error {
	kind := sandbox.Internal
	switch res.StatusCode {
	case http.StatusBadRequest, http.StatusRequestedRangeNotSatisfiable:
		kind = sandbox.Invalid
	case http.StatusUnauthorized, http.StatusForbidden:
		kind = sandbox.Denied
	case http.StatusNotFound:
		kind = sandbox.NotFound
	case http.StatusConflict:
		kind = sandbox.Conflict
	case http.StatusInsufficientStorage, http.StatusTooManyRequests:
		kind = sandbox.Exhausted
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		kind = sandbox.Unavailable
	}
	text, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	var body wire.Error
	if json.Unmarshal(text, &body) != nil || body.Message == "" {
		body.Message = res.Status
	}
	return sandbox.E(op, kind, "", errors.New(body.Message))
}
