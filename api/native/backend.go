// Package native is Atoll's own API: what a node can do, as Go methods
// (Backend), over HTTP under /api/v1 (Handler), and back again (Client).
//
// Local answers from a node in this process, Client from one behind HTTP, and
// both are a Backend. So the command line is written once and does not know
// whether a daemon runs, and Handler serves whatever Backend it is given.
// The API's description (OpenAPI 3.1) is derived from the same table of routes
// that serves it.
package native

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// Backend is everything that can be asked of a node. A ref is a full ID, a
// prefix of one that is unique, or a name. All errors are *sandbox.Err. Methods
// may be called from many goroutines.
type Backend interface {
	Sandboxes
	Snapshots
	Worktrees
	Images
	Templates
	Host
	Peers
	Keys

	// Close releases what the backend holds in this process; sandboxes go on.
	Close() error
}

// Sandboxes makes sandboxes and acts on them.
type Sandboxes interface {
	// Create returns when the guest answers and is initialised.
	Create(ctx context.Context, req node.CreateRequest) (node.Sandbox, error)
	// Run is Create and the start of a main command; see node.Run.
	Run(ctx context.Context, req node.RunRequest, report func(node.RunEvent)) (node.Sandbox, error)
	Get(ctx context.Context, ref string) (node.Sandbox, error)
	// List returns the newest first, without the tokens.
	List(ctx context.Context, f node.Filter) ([]node.Sandbox, error)
	Remove(ctx context.Context, ref string) error
	// Pause stops a sandbox so that it can go on later.
	Pause(ctx context.Context, ref string, mode node.PauseMode) (node.Sandbox, error)
	Resume(ctx context.Context, ref string) (node.Sandbox, error)
	Rename(ctx context.Context, ref, name string) error
	// SetTimeout sets the end to now + d; 0 lifts it.
	SetTimeout(ctx context.Context, ref string, d time.Duration) error
	UpdateNetwork(ctx context.Context, ref string, p sandbox.NetworkPolicy) error
	Fork(ctx context.Context, ref string, count int, req node.CreateRequest) ([]node.ForkResult, error)
	Stats(ctx context.Context, ref string) (sandbox.Stats, error)
	// Wait returns when the sandbox is in one of the states; with none, when its
	// main command or it has ended.
	Wait(ctx context.Context, ref string, states ...sandbox.State) (node.Sandbox, error)
	// Dial opens a byte stream to a TCP port on the sandbox's loopback. The
	// connection has CloseWrite, which the sandbox sees as the end of the stream.
	Dial(ctx context.Context, ref string, port int) (net.Conn, error)
	// Changes writes what the sandbox changed in its root as an OCI layer.
	Changes(ctx context.Context, ref string, w io.Writer) error
	// Console returns what a machine wrote to its console from a byte on, or from
	// the oldest that is kept. Sandboxes that are no machines: Unsupported.
	Console(ctx context.Context, ref string, since int64) (Console, error)
	Expose(ctx context.Context, ref string, p node.Port) (node.Port, error)
	Unexpose(ctx context.Context, ref string, guestPort int) error
}

// Snapshots keeps and restores saved states.
type Snapshots interface {
	Snapshot(ctx context.Context, ref, name string) (node.Snapshot, error)
	// Restore makes a sandbox from a snapshot; zero fields of req come from it.
	Restore(ctx context.Context, snapshotRef string, req node.CreateRequest) (node.Sandbox, error)
	// Snapshots lists those of one sandbox, or all when the ref is empty.
	Snapshots(ctx context.Context, sandboxRef string) ([]node.Snapshot, error)
	GetSnapshot(ctx context.Context, ref string) (node.Snapshot, error)
	RemoveSnapshot(ctx context.Context, ref string) error
}

// Host is about the node itself.
type Host interface {
	Info(ctx context.Context) (node.Info, error)
	Runtimes(ctx context.Context) ([]node.RuntimeInfo, error)
	// Events delivers what happens from the event after since on, until ctx ends
	// or the node goes away, and then closes the channel.
	Events(ctx context.Context, since uint64) (<-chan sandbox.Event, error)
	Pools(ctx context.Context) ([]node.Pool, error)
	SetPool(ctx context.Context, template string, size int) error
	// Prune removes what no sandbox, snapshot or template needs.
	Prune(ctx context.Context) (node.PruneReport, error)
}

// Keys manages who may ask.
type Keys interface {
	// CreateKey returns the secret, which is kept nowhere.
	CreateKey(ctx context.Context, team, name string) (NewKey, error)
	Keys(ctx context.Context) ([]tenant.Key, error)
	RevokeKey(ctx context.Context, ref string) error
}

// NewKey is a key with its secret, which is shown this once.
type NewKey struct {
	Secret string     `json:"secret"`
	Key    tenant.Key `json:"key"`
}
