package node

import (
	"context"
	"io"

	"github.com/atoll-run/atoll/sandbox"
)

// takeFiles saves what a sandbox has in its root, and not its memory, as a snapshot whose only content is the root that it
// names: the sandbox's own with the changes laid over it. Its machine boots anew from that. The entry's op is held.
func (n *Node) takeFiles(ctx context.Context, rec Sandbox, s Snapshot) (saved Snapshot, err error) {
	const op = "node.Snapshot"
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return Snapshot{}, err
	}
	if !r.Capabilities().Changes || rec.Spec.Root.Kind != sandbox.RootEROFS {
		return Snapshot{}, sandbox.Errorf(op, sandbox.Unsupported, rec.Name, "runtime %s cannot save the files of such a sandbox without its memory", rec.Runtime)
	}
	draft, err := n.cfg.Snapshots.Begin()
	if err != nil {
		return Snapshot{}, err
	}
	layer, changes := io.Pipe()
	defer layer.Close()
	go func() { changes.CloseWithError(r.Changes(ctx, rec.ID, changes)) }()
	err = n.cfg.Images.Extend(ctx, rec.Spec.Root, layer, func(root sandbox.Root) error {
		rec.Spec.Root = root
		saved, err = commit(draft, rec, s)
		return err
	})
	if err != nil {
		_ = draft.Abort() // swept at the next start if it fails
		return Snapshot{}, err
	}
	return saved, nil
}

// filesOnly reports whether the snapshot is one of takeFiles. What a runtime without memory saves is its own affair.
func (s Snapshot) filesOnly(c sandbox.Capabilities) bool { return c.Memory && !s.Memory }
