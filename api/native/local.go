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

// Local is the Backend of a node in this process.
type Local struct {
	node  *node.Node
	keys  *tenant.Keys
	peers Peering // empty without a daemon
	close func() error
}

var _ Backend = (*Local)(nil)

// NewLocal returns the backend of a node. Close calls close, which may be nil.
func NewLocal(n *node.Node, keys *tenant.Keys, close func() error) *Local {
	return &Local{node: n, keys: keys, close: close}
}

// Close implements Backend.
func (l *Local) Close() error {
	if l.close == nil {
		return nil
	}
	return l.close()
}

// Create implements Backend.
func (l *Local) Create(ctx context.Context, req node.CreateRequest) (node.Sandbox, error) {
	return l.node.Create(ctx, req)
}

// Run implements Backend.
func (l *Local) Run(ctx context.Context, req node.RunRequest, report func(node.RunEvent)) (node.Sandbox, error) {
	return l.node.Run(ctx, req, report)
}

// Get implements Backend.
func (l *Local) Get(ctx context.Context, ref string) (node.Sandbox, error) {
	return l.node.Get(ctx, ref)
}

// List implements Backend.
func (l *Local) List(ctx context.Context, f node.Filter) ([]node.Sandbox, error) {
	all, err := l.node.List(ctx, f)
	for i := range all {
		all[i].GuestToken, all[i].TrafficToken = "", ""
	}
	return all, err
}

// Remove implements Backend.
func (l *Local) Remove(ctx context.Context, ref string) error { return l.node.Remove(ctx, ref) }

// Pause implements Backend.
func (l *Local) Pause(ctx context.Context, ref string, mode node.PauseMode) (node.Sandbox, error) {
	return l.node.Pause(ctx, ref, mode)
}

// Resume implements Backend.
func (l *Local) Resume(ctx context.Context, ref string) (node.Sandbox, error) {
	return l.node.Resume(ctx, ref)
}

// Rename implements Backend.
func (l *Local) Rename(ctx context.Context, ref, name string) error {
	return l.node.Rename(ctx, ref, name)
}

// SetTimeout implements Backend.
func (l *Local) SetTimeout(ctx context.Context, ref string, d time.Duration) error {
	return l.node.SetTimeout(ctx, ref, d)
}

// UpdateNetwork implements Backend.
func (l *Local) UpdateNetwork(ctx context.Context, ref string, p sandbox.NetworkPolicy) error {
	return l.node.UpdateNetwork(ctx, ref, p)
}

// Fork implements Backend.
func (l *Local) Fork(ctx context.Context, ref string, count int, req node.CreateRequest) ([]node.ForkResult, error) {
	return l.node.Fork(ctx, ref, count, req)
}

// Stats implements Backend.
func (l *Local) Stats(ctx context.Context, ref string) (sandbox.Stats, error) {
	return l.node.Stats(ctx, ref)
}

// Wait implements Backend.
func (l *Local) Wait(ctx context.Context, ref string, states ...sandbox.State) (node.Sandbox, error) {
	return l.node.Wait(ctx, ref, states...)
}

// Dial implements Backend.
func (l *Local) Dial(ctx context.Context, ref string, port int) (net.Conn, error) {
	return l.node.Dial(ctx, ref, port)
}

// Changes implements Backend.
func (l *Local) Changes(ctx context.Context, ref string, w io.Writer) error {
	return l.node.Changes(ctx, ref, w)
}

// Expose implements Backend.
func (l *Local) Expose(ctx context.Context, ref string, p node.Port) (node.Port, error) {
	return l.node.Expose(ctx, ref, p)
}

// Unexpose implements Backend.
func (l *Local) Unexpose(ctx context.Context, ref string, guestPort int) error {
	return l.node.Unexpose(ctx, ref, guestPort)
}

// Snapshot implements Backend.
func (l *Local) Snapshot(ctx context.Context, ref, name string) (node.Snapshot, error) {
	return l.node.Snapshot(ctx, ref, name)
}

// Restore implements Backend.
func (l *Local) Restore(ctx context.Context, snapshotRef string, req node.CreateRequest) (node.Sandbox, error) {
	return l.node.Restore(ctx, snapshotRef, req)
}

// Snapshots implements Backend.
func (l *Local) Snapshots(ctx context.Context, sandboxRef string) ([]node.Snapshot, error) {
	all, err := l.node.Snapshots(ctx, sandboxRef)
	for i := range all {
		all[i].Source.GuestToken, all[i].Source.TrafficToken = "", ""
	}
	return all, err
}

// GetSnapshot implements Backend.
func (l *Local) GetSnapshot(ctx context.Context, ref string) (node.Snapshot, error) {
	s, err := l.node.GetSnapshot(ctx, ref)
	s.Source.GuestToken, s.Source.TrafficToken = "", ""
	return s, err
}

// RemoveSnapshot implements Backend.
func (l *Local) RemoveSnapshot(ctx context.Context, ref string) error {
	return l.node.RemoveSnapshot(ctx, ref)
}

// Info implements Backend.
func (l *Local) Info(context.Context) (node.Info, error) { return l.node.Info(), nil }

// Runtimes implements Backend.
func (l *Local) Runtimes(context.Context) ([]node.RuntimeInfo, error) { return l.node.Runtimes(), nil }

// Events implements Backend.
func (l *Local) Events(ctx context.Context, since uint64) (<-chan sandbox.Event, error) {
	return l.node.Events(ctx, since), nil
}

// Pools implements Backend.
func (l *Local) Pools(context.Context) ([]node.Pool, error) { return l.node.Pools(), nil }

// SetPool implements Backend.
func (l *Local) SetPool(ctx context.Context, template string, size int) error {
	return l.node.SetPool(ctx, template, size)
}

// Prune implements Backend.
func (l *Local) Prune(ctx context.Context) (node.PruneReport, error) { return l.node.Prune(ctx) }

// CreateKey implements Backend.
func (l *Local) CreateKey(ctx context.Context, team, name string) (NewKey, error) {
	if name == tenant.RootKey {
		return NewKey{}, sandbox.Errorf("native.CreateKey", sandbox.Exists, name, "the name is that of the node's own key").
			WithHint("choose another name")
	}
	secret, key, err := l.keys.Create(ctx, team, name)
	return NewKey{Key: key, Secret: secret}, err
}

// Keys implements Backend.
func (l *Local) Keys(ctx context.Context) ([]tenant.Key, error) { return l.keys.List(ctx), nil }

// RevokeKey implements Backend.
func (l *Local) RevokeKey(ctx context.Context, ref string) error { return l.keys.Revoke(ctx, ref) }
