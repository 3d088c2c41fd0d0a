package native

import (
	"context"
	"io"
	"net/http"

	"github.com/atoll-run/atoll/sandbox"
)

// Worktrees brings back what was done in sandboxes that are git working trees.
// Sandboxes of other runtimes have no repository: Unsupported.
type Worktrees interface {
	// Diff writes what the sandbox changed against the commit that it began
	// with, as a patch that git apply takes.
	Diff(ctx context.Context, ref string, w io.Writer) error
	// Merge takes the sandbox's work into the repository that it came from. On a
	// conflict it fails with Conflict and has changed nothing.
	Merge(ctx context.Context, ref string, req MergeRequest) (MergeResult, error)
}

// The modes of a merge.
const (
	MergeCommits = "merge"  // keep the sandbox's commits
	MergeSquash  = "squash" // one commit
	MergeApply   = "apply"  // no commit, changes in the working tree
)

// MergeRequest says how a working tree's changes come back.
type MergeRequest struct {
	Mode    string `json:"mode,omitempty"`    // default: MergeCommits
	Message string `json:"message,omitempty"` // of the commit
	Force   bool   `json:"force,omitempty"`   // although the repository's working tree has changes
}

// MergeResult is what a merge did.
type MergeResult struct {
	Branch string   `json:"branch"`         // where the sandbox's work is kept in any case
	Head   string   `json:"head,omitempty"` // the commit that the repository is at now; empty after MergeApply
	Files  []string `json:"files"`          // that changed in the repository's working tree
}

// Diff implements Backend.
func (l *Local) Diff(ctx context.Context, ref string, w io.Writer) error {
	r, id, err := l.node.WorkingTrees(ctx, ref)
	if err != nil {
		return err
	}
	return r.Diff(ctx, id, w)
}

// Merge implements Backend.
func (l *Local) Merge(ctx context.Context, ref string, req MergeRequest) (MergeResult, error) {
	const op = "native.Merge"
	r, id, err := l.node.WorkingTrees(ctx, ref)
	if err != nil {
		return MergeResult{}, err
	}
	var m sandbox.Merged
	switch req.Mode {
	case "", MergeCommits, MergeSquash:
		m, err = r.Merge(ctx, id, sandbox.MergeOptions{Message: req.Message, Squash: req.Mode == MergeSquash, Force: req.Force})
	case MergeApply:
		m, err = r.Apply(ctx, id, req.Force)
	default:
		err = sandbox.Errorf(op, sandbox.Invalid, req.Mode, "the modes are %s, %s and %s", MergeCommits, MergeSquash, MergeApply)
	}
	return MergeResult{Branch: m.Branch, Head: m.Head, Files: m.Files}, err
}

// Diff implements Backend.
func (c *Client) Diff(ctx context.Context, ref string, w io.Writer) error {
	return c.download(ctx, "native.Diff", sandboxPath(ref, "/diff"), nil, w)
}

// Merge implements Backend.
func (c *Client) Merge(ctx context.Context, ref string, req MergeRequest) (MergeResult, error) {
	return ask[MergeResult](ctx, c, "native.Merge", http.MethodPost, sandboxPath(ref, "/merge"), nil, req)
}

func (s scoped) Diff(ctx context.Context, ref string, w io.Writer) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.Diff(ctx, sb.ID, w)
}

func (s scoped) Merge(context.Context, string, MergeRequest) (MergeResult, error) {
	return MergeResult{}, s.denied("writing to a repository of the host")
}

func worktreeRoutes() []route {
	return []route{
		{method: "GET", path: "/api/v1/sandboxes/{ref}/diff", summary: "A working tree's changes against its base, as a git patch", returns: "text/x-diff",
			serve: func(c *call) error {
				return c.stream("text/x-diff", func(w http.ResponseWriter) error { return c.backend.Diff(c.ctx, c.ref(), w) })
			}},
		on("POST", "/api/v1/sandboxes/{ref}/merge", "Bring a working tree's changes back into its repository", func(c *call, in MergeRequest) (MergeResult, error) {
			return c.backend.Merge(c.ctx, c.ref(), in)
		}),
	}
}
