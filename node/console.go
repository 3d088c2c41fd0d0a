package node

import (
	"context"

	"github.com/atoll-run/atoll/sandbox"
)

// Consoles is what a runtime offers besides the Runtime contract when its sandboxes
// are machines.
type Consoles interface {
	// Console returns what the machine wrote to its console, from the byte since on,
	// or from the oldest that is kept, and the number of the byte after it.
	Console(ctx context.Context, id string, since int64) (text []byte, next int64, err error)
}

// Console reads a sandbox's console. It fails with Unsupported for one that has none.
func (n *Node) Console(ctx context.Context, ref string, since int64) (text []byte, next int64, err error) {
	const op = "node.Console"
	sb, err := n.Get(ctx, ref)
	if err != nil {
		return nil, 0, err
	}
	r, err := n.Runtime(sb.Runtime)
	if err != nil {
		return nil, 0, err
	}
	c, ok := r.(Consoles)
	if !ok {
		return nil, 0, sandbox.Errorf(op, sandbox.Unsupported, sb.Name, "a %s sandbox is no machine with a console", sb.Runtime)
	}
	if !live(sb.State) || sb.Suspended != "" {
		return nil, 0, sandbox.Errorf(op, sandbox.Conflict, sb.Name, "its machine is gone, and its console with it")
	}
	return c.Console(ctx, sb.ID, since)
}
