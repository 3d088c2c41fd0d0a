package openai

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// The types of error that OpenAI's clients know.
const (
	invalidRequest = "invalid_request_error"
	serverError    = "server_error"
	rateLimit      = "requests"
)

// apiError is an error as the API tells it. An empty Param or Code is null.
type apiError struct {
	status  int
	Message string
	Type    string
	Param   string
	Code    string
}

func (e *apiError) Error() string { return e.Message }

// MarshalJSON implements json.Marshaler.
func (e *apiError) MarshalJSON() ([]byte, error) {
	orNull := func(s string) any {
		if s == "" {
			return nil
		}
		return s
	}
	return json.Marshal(map[string]any{"error": map[string]any{
		"message": e.Message, "type": e.Type, "param": orNull(e.Param), "code": orNull(e.Code)}})
}

// invalid is a request that makes no sense because of one parameter.
func invalid(param, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, Type: invalidRequest, Param: param, Message: fmt.Sprintf(format, args...)}
}

// tooLong is a prompt that does not fit the window.
func tooLong(param string, window, prompt, answer int) *apiError {
	message := fmt.Sprintf("This model's maximum context length is %d tokens. However, your messages resulted in %d tokens.", window, prompt)
	if answer > 0 {
		message = fmt.Sprintf("This model's maximum context length is %d tokens. However, you requested %d tokens (%d in the messages, %d in the completion).",
			window, prompt+answer, prompt, answer)
	}
	return &apiError{status: http.StatusBadRequest, Type: invalidRequest, Param: param, Code: "context_length_exceeded",
		Message: message + " Please reduce the length of the messages or completion."}
}

func jsonError(err error) *apiError {
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		field := strings.TrimPrefix(typ.Field, "settings.") // ours, not the client's
		return invalid(field, "Invalid type for '%s': got a %s.", field, typ.Value)
	}
	var own *apiError
	if errors.As(err, &own) {
		return own
	}
	return invalid("", "We could not parse the JSON body of your request: %v", err)
}

// toAPIError renders any error for a client. What went wrong inside is said only
// for errors that the client can act on.
func toAPIError(err error) *apiError {
	var own *apiError
	if errors.As(err, &own) {
		return own
	}
	e := &apiError{status: http.StatusInternalServerError, Type: serverError, Message: "The server had an error while processing your request."}
	switch sandbox.KindOf(err) {
	case sandbox.Invalid, sandbox.Unsupported:
		e.status, e.Type, e.Message = http.StatusBadRequest, invalidRequest, told(err)
	case sandbox.NotFound:
		e.status, e.Type, e.Message = http.StatusNotFound, invalidRequest, told(err)
	case sandbox.Exhausted:
		e.status, e.Type, e.Code, e.Message = http.StatusTooManyRequests, rateLimit, "rate_limit_exceeded", told(err)
	case sandbox.Unavailable, sandbox.Timeout:
		e.status, e.Code, e.Message = http.StatusServiceUnavailable, "unavailable", told(err)
	}
	return e
}

// told is an error without the names of our operations, with its hint.
func told(err error) string {
	hint := sandbox.HintOf(err)
	message := err.Error()
	var e *sandbox.Err
	for cause := err; errors.As(cause, &e); cause = e.Err {
		message = string(e.Kind)
		if e.Err != nil {
			message = e.Err.Error()
		}
		if e.Subject != "" {
			message = e.Subject + ": " + message
		}
		if e.Err == nil {
			break
		}
	}
	if hint != "" {
		message += " (" + hint + ")"
	}
	return message
}

// fail answers with err. A client that has gone is told nothing.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil || errors.Is(err, context.Canceled) {
		return
	}
	e := toAPIError(err)
	if e.status >= http.StatusInternalServerError && a.Log != nil {
		a.Log.Error("request failed", "path", r.URL.Path, "error", err)
	}
	if e.status == http.StatusTooManyRequests || e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1") // seconds
	}
	writeJSON(w, e.status, e)
}
