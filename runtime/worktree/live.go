package worktree

import (
	"context"
	"io"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Send implements sandbox.Runtime. It cannot.
func (r *Runtime) Send(_ context.Context, id, _ string, _ io.Writer) (stopped time.Time, err error) {
	return stopped, sandbox.E("worktree.Send", sandbox.Unsupported, id, nil)
}

// Receive implements sandbox.Runtime. It cannot.
func (r *Runtime) Receive(_ context.Context, spec sandbox.Spec, _ string, in io.ReadCloser, _ func(run func() error) error) error {
	_ = in.Close() // nobody reads it
	return sandbox.E("worktree.Receive", sandbox.Unsupported, spec.ID, nil)
}
