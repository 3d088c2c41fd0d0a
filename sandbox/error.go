package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Kind is one of the few ways in which an operation fails. API codes and exit
// codes are derived from it in one place each.
type Kind string

// The kinds of error.
const (
	Invalid     Kind = "invalid"     // the request makes no sense; repeating it will not help
	NotFound    Kind = "not_found"   // no such sandbox, image, snapshot, file
	Exists      Kind = "exists"      // the name or id is taken
	Conflict    Kind = "conflict"    // not possible in the present state
	Unsupported Kind = "unsupported" // the runtime cannot do this, see Capabilities
	Denied      Kind = "denied"      // not allowed
	Exhausted   Kind = "exhausted"   // a limit or the host's memory, disk, addresses is used up
	Unavailable Kind = "unavailable" // does not answer now; may work later
	Timeout     Kind = "timeout"     // took longer than was allowed
	Canceled    Kind = "canceled"    // the caller gave up
	Internal    Kind = "internal"    // a defect, ours or of what we stand on
)

// Retryable reports whether the same call may succeed later without any change.
func (k Kind) Retryable() bool { return k == Unavailable || k == Timeout || k == Exhausted }

// Err is the error of every package. It says which operation failed, how, on
// what, and what to do next.
type Err struct {
	Op      string // what was being done, e.g. "gvisor.Create"
	Kind    Kind
	Subject string // the sandbox, image or file concerned; may be empty
	Err     error  // the cause; may be nil
	Hint    string // what the user can do, one sentence; may be empty
}

// Error renders the operation, the subject, the cause and the hint.
func (e *Err) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Subject != "" {
		b.WriteString(" " + e.Subject)
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	} else {
		b.WriteString(": " + strings.ReplaceAll(string(e.Kind), "_", " "))
	}
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Err) Unwrap() error { return e.Err }

// E makes an *Err. If err already has a kind and kind is empty, the kind is kept.
func E(op string, kind Kind, subject string, err error) *Err {
	if kind == "" {
		kind = KindOf(err)
	}
	return &Err{Op: op, Kind: kind, Subject: subject, Err: err}
}

// Errorf makes an *Err whose cause is a formatted message.
func Errorf(op string, kind Kind, subject, format string, args ...any) *Err {
	return &Err{Op: op, Kind: kind, Subject: subject, Err: fmt.Errorf(format, args...)}
}

// WithHint adds what the user can do about it.
func (e *Err) WithHint(hint string) *Err {
	e.Hint = hint
	return e
}

// KindOf returns the kind of the outermost *Err in err's chain that has one.
// Context errors map to Canceled and Timeout; any other error is Internal; nil
// has no kind.
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	var e *Err
	if errors.As(err, &e) && e.Kind != "" {
		return e.Kind
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return Timeout
	}
	return Internal
}

// Is reports whether err is of the kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }

// HintOf returns the innermost hint in err's chain, since the layer nearest to
// the cause knows best what helps; empty when there is none.
func HintOf(err error) string {
	hint := ""
	for err != nil {
		var e *Err
		if !errors.As(err, &e) {
			break
		}
		if e.Hint != "" {
			hint = e.Hint
		}
		err = e.Err
	}
	return hint
}
