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

// scoped is a Backend as a team's key sees it: another team's sandboxes and
// snapshots do not exist, and nothing that would reach into the host is allowed.
// Embedding would let a method added to Backend slip through unscoped, so a test
// checks that each one is either overridden here or listed as harmless.
type scoped struct {
	Backend
	team string
}

func (s scoped) denied(what string) error {
	return sandbox.Errorf("native.Serve", sandbox.Denied, what, "this needs the node's root key").
		WithHint("use the key in $ATOLL_HOME/credentials on the node itself")
}

// own returns the sandbox if it is the team's. The ref of every later call is
// its ID, so that a name given away in between cannot redirect the call.
func (s scoped) own(ctx context.Context, ref string) (node.Sandbox, error) {
	sb, err := s.Backend.Get(ctx, ref)
	if err == nil && sb.Team != s.team {
		err = sandbox.Errorf("native.Get", sandbox.NotFound, ref, "no such sandbox")
	}
	return sb, err
}

func (s scoped) ownSnapshot(ctx context.Context, ref string) (node.Snapshot, error) {
	snap, err := s.Backend.GetSnapshot(ctx, ref)
	if err == nil && snap.Team != s.team {
		err = sandbox.Errorf("native.GetSnapshot", sandbox.NotFound, ref, "no such snapshot")
	}
	return snap, err
}

// admit refuses requests that would give a sandbox a part of the host, or of
// another team.
func (s scoped) admit(ctx context.Context, req *node.CreateRequest) error {
	switch {
	case len(req.Mounts) > 0:
		return s.denied("mounting a directory of the host")
	case req.Network == sandbox.NetworkHost:
		return s.denied("the host's network")
	case len(req.Ports) > 0:
		return s.denied("opening a port of the host")
	case len(req.Labels) > 0:
		return s.denied("passing labels to the runtime")
	case len(req.Image) > 0 && (req.Image[0] == '/' || req.Image[0] == '.'):
		return s.denied("a repository on the host")
	}
	req.Team = s.team
	return s.mayStart(ctx, req.Image)
}

func (s scoped) Create(ctx context.Context, req node.CreateRequest) (node.Sandbox, error) {
	if err := s.admit(ctx, &req); err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Create(ctx, req)
}

func (s scoped) Run(ctx context.Context, req node.RunRequest, report func(node.RunEvent)) (node.Sandbox, error) {
	if err := s.admit(ctx, &req.Sandbox); err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Run(ctx, req, report)
}

func (s scoped) Get(ctx context.Context, ref string) (node.Sandbox, error) { return s.own(ctx, ref) }

func (s scoped) List(ctx context.Context, f node.Filter) ([]node.Sandbox, error) {
	f.Team = s.team
	return s.Backend.List(ctx, f)
}

func (s scoped) Remove(ctx context.Context, ref string) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.Remove(ctx, sb.ID)
}

func (s scoped) Pause(ctx context.Context, ref string, mode node.PauseMode) (node.Sandbox, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Pause(ctx, sb.ID, mode)
}

func (s scoped) Resume(ctx context.Context, ref string) (node.Sandbox, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Resume(ctx, sb.ID)
}

func (s scoped) Rename(ctx context.Context, ref, name string) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.Rename(ctx, sb.ID, name)
}

func (s scoped) SetTimeout(ctx context.Context, ref string, d time.Duration) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.SetTimeout(ctx, sb.ID, d)
}

func (s scoped) UpdateNetwork(ctx context.Context, ref string, p sandbox.NetworkPolicy) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.UpdateNetwork(ctx, sb.ID, p)
}

func (s scoped) Fork(ctx context.Context, ref string, count int, req node.CreateRequest) ([]node.ForkResult, error) {
	sb, err := s.own(ctx, ref)
	if err == nil {
		err = s.admit(ctx, &req)
	}
	if err != nil {
		return nil, err
	}
	return s.Backend.Fork(ctx, sb.ID, count, req)
}

func (s scoped) Stats(ctx context.Context, ref string) (sandbox.Stats, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return sandbox.Stats{}, err
	}
	return s.Backend.Stats(ctx, sb.ID)
}

func (s scoped) Wait(ctx context.Context, ref string, states ...sandbox.State) (node.Sandbox, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Wait(ctx, sb.ID, states...)
}

func (s scoped) Dial(ctx context.Context, ref string, port int) (net.Conn, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return nil, err
	}
	return s.Backend.Dial(ctx, sb.ID, port)
}

func (s scoped) Changes(ctx context.Context, ref string, w io.Writer) error {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.Changes(ctx, sb.ID, w)
}

func (s scoped) Expose(context.Context, string, node.Port) (node.Port, error) {
	return node.Port{}, s.denied("opening a port of the host")
}

func (s scoped) Unexpose(context.Context, string, int) error {
	return s.denied("closing a port of the host")
}

func (s scoped) Snapshot(ctx context.Context, ref, name string) (node.Snapshot, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return node.Snapshot{}, err
	}
	return s.Backend.Snapshot(ctx, sb.ID, name)
}

func (s scoped) Restore(ctx context.Context, ref string, req node.CreateRequest) (node.Sandbox, error) {
	snap, err := s.ownSnapshot(ctx, ref)
	if err == nil {
		err = s.admit(ctx, &req)
	}
	if err != nil {
		return node.Sandbox{}, err
	}
	return s.Backend.Restore(ctx, snap.ID, req)
}

func (s scoped) Snapshots(ctx context.Context, sandboxRef string) ([]node.Snapshot, error) {
	all, err := s.Backend.Snapshots(ctx, sandboxRef)
	mine := all[:0]
	for _, snap := range all {
		if snap.Team == s.team {
			mine = append(mine, snap)
		}
	}
	return mine, err
}

func (s scoped) GetSnapshot(ctx context.Context, ref string) (node.Snapshot, error) {
	return s.ownSnapshot(ctx, ref)
}

func (s scoped) RemoveSnapshot(ctx context.Context, ref string) error {
	snap, err := s.ownSnapshot(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.RemoveSnapshot(ctx, snap.ID)
}

// Events of other teams' sandboxes say who exists, so they are for the root key.
func (s scoped) Events(context.Context, uint64) (<-chan sandbox.Event, error) {
	return nil, s.denied("the node's events")
}

func (s scoped) SetPool(context.Context, string, int) error { return s.denied("pools") }

func (s scoped) Prune(context.Context) (node.PruneReport, error) {
	return node.PruneReport{}, s.denied("pruning")
}

func (s scoped) CreateKey(context.Context, string, string) (NewKey, error) {
	return NewKey{}, s.denied("creating keys")
}

func (s scoped) Keys(context.Context) ([]tenant.Key, error) { return nil, s.denied("listing keys") }

func (s scoped) RevokeKey(context.Context, string) error { return s.denied("revoking keys") }
