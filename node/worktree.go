package node

import (
	"context"
	"io"

	"github.com/atoll-run/atoll/sandbox"
)

// WorkingTrees is what a runtime offers besides the Runtime contract when its
// sandboxes are working trees of repositories on this host.
type WorkingTrees interface {
	// Diff writes what the sandbox changed against the commit that it began
	// with, as a patch that git apply takes.
	Diff(ctx context.Context, id string, w io.Writer) error
	// Merge takes the sandbox's work into the branch that the repository has
	// checked out; Apply puts it into the repository's working tree and commits
	// nothing. On a conflict they fail with Conflict and have changed nothing.
	Merge(ctx context.Context, id string, o sandbox.MergeOptions) (sandbox.Merged, error)
	Apply(ctx context.Context, id string, force bool) (sandbox.Merged, error)
}

// WorkingTrees returns the runtime of a sandbox that is a working tree, and the
// sandbox's ID. It fails with Unsupported for any other.
func (n *Node) WorkingTrees(ctx context.Context, ref string) (WorkingTrees, string, error) {
	sb, err := n.Get(ctx, ref)
	if err != nil {
		return nil, "", err
	}
	r, err := n.Runtime(sb.Runtime)
	if err != nil {
		return nil, "", err
	}
	w, ok := r.(WorkingTrees)
	if !ok {
		return nil, "", sandbox.Errorf("node.WorkingTrees", sandbox.Unsupported, sb.Name, "a %s sandbox is not the working tree of a repository", sb.Runtime).
			WithHint("make one with `--runtime worktree` and the path of a repository")
	}
	return w, sb.ID, nil
}
