package node

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// What a snapshot that the node made for itself is for.
const (
	autoPause    = "pause"    // the state of a sandbox that is paused on disk
	autoFork     = "fork"     // the parent of forked children, kept while one of them lives
	autoTemplate = "template" // where a template's sandboxes start
)

// maxFork bounds the children of one fork.
const maxFork = 1000

// Snapshot saves the state of a running sandbox, which goes on.
func (n *Node) Snapshot(ctx context.Context, ref, name string) (Snapshot, error) {
	const op = "node.Snapshot"
	if name != "" && !nameOK(name) {
		return Snapshot{}, sandbox.Errorf(op, sandbox.Invalid, name, "not a name")
	}
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if err := mustStay(op, rec); err != nil {
		return Snapshot{}, err
	}
	if rec.State == sandbox.Paused && rec.Suspended == "" { // frozen in memory: still there to be saved
		rec.State = sandbox.Running
	}
	if err := mustBe(op, rec, sandbox.Running); err != nil {
		return Snapshot{}, err
	}
	return n.takeSnapshot(ctx, rec, Snapshot{Name: name})
}

// takeSnapshot saves rec's state under the name and purpose in s. The entry's
// op is held.
func (n *Node) takeSnapshot(ctx context.Context, rec Sandbox, s Snapshot) (Snapshot, error) {
	return n.takeState(ctx, rec, s, sandbox.SnapshotOptions{})
}

// takeState is takeSnapshot in the runtime's way that opts asks for.
func (n *Node) takeState(ctx context.Context, rec Sandbox, s Snapshot, opts sandbox.SnapshotOptions) (Snapshot, error) {
	const op = "node.Snapshot"
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return Snapshot{}, err
	}
	caps := r.Capabilities()
	if !caps.Snapshot {
		return Snapshot{}, sandbox.Errorf(op, sandbox.Unsupported, rec.Name, "runtime %s has no snapshots", rec.Runtime)
	}
	draft, err := n.cfg.Snapshots.Begin()
	if err != nil {
		return Snapshot{}, err
	}
	if err := r.Snapshot(ctx, rec.ID, draft.Dir, opts); err != nil {
		_ = draft.Abort() // swept at the next start if it fails
		return Snapshot{}, err
	}
	s.Memory = caps.Memory
	return commit(draft, rec, s)
}

// commit makes a draft the snapshot of rec's state under the name and purpose in s, which says too whether memory is in it.
func commit(draft *snapshot.Draft, rec Sandbox, s Snapshot) (Snapshot, error) {
	s.Team, s.Parent, s.Sandbox, s.Runtime = rec.Team, rec.Parent, rec.ID, rec.Runtime
	s.Created, s.Image = time.Now().UTC(), rec.Image
	s.Metadata, s.Source = rec.Metadata, rec
	meta, err := json.Marshal(s)
	if err != nil {
		_ = draft.Abort()
		return Snapshot{}, sandbox.E("node.Snapshot", sandbox.Internal, rec.Name, err)
	}
	// A snapshot that lives for moments is not worth reading once more to hash it.
	m, err := draft.Commit(snapshot.Manifest{Parent: s.Parent, Sandbox: s.Sandbox, Runtime: s.Runtime, Memory: s.Memory,
		Created: s.Created, Spec: rec.Spec, Meta: meta}, s.Auto != autoFork)
	if err != nil {
		return Snapshot{}, err
	}
	return fromManifest(m)
}

func fromManifest(m snapshot.Manifest) (Snapshot, error) {
	var s Snapshot
	if err := json.Unmarshal(m.Meta, &s); err != nil {
		return s, sandbox.E("node.Snapshot", sandbox.Invalid, m.ID, err)
	}
	s.ID, s.Size = m.ID, m.Size()
	return s, nil
}

// GetSnapshot returns the snapshot with this ID, name, or beginning of an ID.
func (n *Node) GetSnapshot(_ context.Context, ref string) (Snapshot, error) {
	const op = "node.GetSnapshot"
	var found []snapshot.Manifest
	for _, m := range slices.Concat(n.cfg.Snapshots.List(), n.cfg.Snapshots.Lent()) { // what is on its way can be restored
		if m.ID == ref {
			return fromManifest(m)
		}
		s, err := fromManifest(m)
		if err == nil && (s.Name == ref && ref != "" || len(ref) >= minPrefix && strings.HasPrefix(m.ID, ref)) {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 0:
		if _, err := n.cfg.Snapshots.Get(ref); sandbox.Is(err, sandbox.Invalid) {
			return Snapshot{}, err // it is there, damaged
		}
		return Snapshot{}, sandbox.Errorf(op, sandbox.NotFound, ref, "no such snapshot").WithHint("see `atoll snapshot ls`")
	case 1:
		return fromManifest(found[0])
	}
	return Snapshot{}, sandbox.Errorf(op, sandbox.Invalid, ref, "%d snapshots are called or begin with this", len(found)).WithHint("give the whole id")
}

// Snapshots lists the snapshots that users made, newest first: of one sandbox,
// or all when ref is empty.
func (n *Node) Snapshots(_ context.Context, ref string) ([]Snapshot, error) {
	id := ref
	if e, err := n.find("node.Snapshots", ref); ref != "" && err == nil {
		id = n.record(e).ID
	}
	var out []Snapshot
	for _, m := range slices.Backward(n.cfg.Snapshots.List()) {
		if s, err := fromManifest(m); err == nil && s.Auto == "" && (id == "" || s.Sandbox == id) {
			out = append(out, s)
		}
	}
	return out, nil
}

// RemoveSnapshot deletes a snapshot that nothing needs any more.
func (n *Node) RemoveSnapshot(ctx context.Context, ref string) error {
	const op = "node.RemoveSnapshot"
	id := ref // of one that is damaged no more is known
	if _, err := n.cfg.Snapshots.Get(ref); !sandbox.Is(err, sandbox.Invalid) {
		s, err := n.GetSnapshot(ctx, ref)
		if err != nil {
			return err
		}
		id = s.ID
	}
	if slices.ContainsFunc(n.cfg.Snapshots.Lent(), func(m snapshot.Manifest) bool { return m.ID == id }) {
		return sandbox.Errorf(op, sandbox.Conflict, ref, "it is still on its way from another node").WithHint("remove it when it is here")
	}
	if user := n.neededBy(id); user != "" {
		return sandbox.Errorf(op, sandbox.Conflict, ref, "%s needs it", user)
	}
	return n.dropSnapshot(id)
}

// neededBy names what would break without the snapshot; empty if nothing would.
func (n *Node) neededBy(id string) string {
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, e := range n.entries {
		if e.rec.Suspended == id {
			return "paused sandbox " + e.rec.Name
		}
	}
	for _, t := range n.templates {
		for _, b := range t.Builds {
			if b.Snapshot == id {
				return "template " + t.ID
			}
		}
	}
	return ""
}

// dropSnapshot deletes a snapshot; one that is gone already is no error.
func (n *Node) dropSnapshot(id string) error {
	if err := n.cfg.Snapshots.Remove(id); err != nil && !sandbox.Is(err, sandbox.NotFound) {
		return err
	}
	return nil
}

// Restore makes a new sandbox from a snapshot. Fields of req that are set
// replace those of the sandbox that was saved; Image, Resources, Mounts,
// Volumes and Network cannot differ from it.
func (n *Node) Restore(ctx context.Context, ref string, req CreateRequest) (Sandbox, error) {
	s, err := n.GetSnapshot(ctx, ref)
	if err != nil {
		return Sandbox{}, err
	}
	return n.launch(ctx, child(s, req), source{snap: s.ID})
}

// child drafts the record of a sandbox restored from s.
func child(s Snapshot, req CreateRequest) Sandbox {
	now := time.Now().UTC()
	rec := s.Source
	rec.ID, rec.Name, rec.State, rec.Reason, rec.Parent = sandbox.NewID(), req.Name, sandbox.Creating, "", s.ID
	rec.CreatedAt, rec.StartedAt, rec.EndedAt, rec.PausedAt = now, now, nil, nil
	rec.Suspended, rec.Pooled = "", ""
	// A main command goes on in the child, for nobody; without the memory it is
	// not there.
	if rec.Main = rec.Main.detached(); !s.Memory {
		rec.Main = nil
	}
	rec.Team = cmp.Or(req.Team, rec.Team)
	rec.Env = merged(rec.Env, req.Env)
	rec.User, rec.Workdir = cmp.Or(req.User, rec.User), cmp.Or(req.Workdir, rec.Workdir)
	if req.Metadata != nil { // nil inherits
		rec.Metadata = maps.Clone(req.Metadata)
	}
	rec.Ports = slices.Clone(req.Ports) // the parent still has its own
	if req.Policy != nil {
		parents := rec.Policy.RateLimit
		rec.Policy = *req.Policy
		rec.Policy.RateLimit = cmp.Or(rec.Policy.RateLimit, parents)
	}
	if rec.GuestToken != "" || req.Secure { // each child has secrets of its own
		rec.GuestToken = newToken()
	}
	if rec.TrafficToken != "" || req.PrivateAccess {
		rec.TrafficToken, rec.PublicTraffic = newToken(), false
	}
	if req.Lifecycle != (Lifecycle{}) {
		rec.Lifecycle = req.Lifecycle
	}
	rec.Lifecycle.Remove = req.Lifecycle.Remove // what became of a parent's child is worth a look
	rec.Lifecycle.Timeout = cmp.Or(req.Timeout, rec.Lifecycle.Timeout)
	rec.Lifecycle.AutoResume = rec.Lifecycle.AutoResume || rec.Lifecycle.Idle > 0
	rec.EndAt = deadline(now, rec.Lifecycle.Timeout)
	rec.Spec.ID, rec.Spec.Link = rec.ID, nil
	rec.Spec.Hostname = req.Hostname // the name, unless asked for
	rec.Spec.Labels = merged(rec.Spec.Labels, req.Labels)
	return rec
}

// Fork makes count children of a sandbox: each goes on from where the parent is
// now. Children fail one by one; only when none can be made is there an error.
func (n *Node) Fork(ctx context.Context, ref string, count int, req CreateRequest) ([]ForkResult, error) {
	const op = "node.Fork"
	if count < 1 || count > maxFork {
		return nil, sandbox.Errorf(op, sandbox.Invalid, ref, "cannot fork %d times; between 1 and %d", count, maxFork)
	}
	if req.Name != "" && count > 1 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, req.Name, "%d children cannot share one name", count)
	}
	s, err := n.forkPoint(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	results := make([]ForkResult, count)
	index := make([]int, count)
	for i := range index {
		index[i] = i
	}
	err = each(index, func(i int) error {
		sb, err := n.launch(ctx, child(s, req), source{snap: s.ID})
		if err != nil {
			results[i].Err = err
			return err
		}
		results[i].Sandbox = &sb
		return nil
	})
	n.releaseParent(Sandbox{Parent: s.ID}) // in case no child was made
	if slices.ContainsFunc(results, func(r ForkResult) bool { return r.Err == nil }) {
		return results, nil
	}
	return results, sandbox.E(op, "", ref, err)
}

// forkPoint is the snapshot from which the children of a sandbox start: a fresh
// one, or the one that holds it when it is paused on disk.
func (n *Node) forkPoint(ctx context.Context, op, ref string) (Snapshot, error) {
	e, err := n.lock(ctx, op, ref)
	if err != nil {
		return Snapshot{}, err
	}
	defer e.op.unlock()
	rec := n.record(e)
	if rec.Suspended != "" {
		return n.GetSnapshot(ctx, rec.Suspended)
	}
	if err := mustStay(op, rec); err != nil {
		return Snapshot{}, err
	}
	if rec.State != sandbox.Paused {
		if err := mustBe(op, rec, sandbox.Running); err != nil {
			return Snapshot{}, err
		}
	}
	return n.takeSnapshot(ctx, rec, Snapshot{Auto: autoFork})
}

// releaseParent removes the snapshot from which rec was forked when no other
// sandbox that lives came from it.
func (n *Node) releaseParent(rec Sandbox) {
	if rec.Parent == "" {
		return
	}
	m, err := n.cfg.Snapshots.Get(rec.Parent)
	if err != nil {
		return
	}
	if s, err := fromManifest(m); err != nil || s.Auto != autoFork {
		return
	}
	siblings := n.records(func(r Sandbox) bool {
		return r.Parent == rec.Parent && r.ID != rec.ID && r.State != sandbox.Terminated && r.State != sandbox.Terminating
	})
	if len(siblings) > 0 {
		return
	}
	if err := n.dropSnapshot(rec.Parent); err != nil {
		n.log.Error("removing a fork's snapshot", "snapshot", rec.Parent, "error", err)
	}
}

// sweepSnapshots removes the node's own snapshots that nothing refers to, and
// unnamed ones that the retention policy lets go.
func (n *Node) sweepSnapshots() []string {
	parents := make(map[string]bool)
	for _, r := range n.records(func(r Sandbox) bool { return live(r.State) }) {
		parents[r.Parent] = true
	}
	var removed []string
	drop := func(id string) {
		if err := n.dropSnapshot(id); err != nil {
			n.log.Error("removing a snapshot", "snapshot", id, "error", err)
			return
		}
		removed = append(removed, id)
	}
	for _, m := range n.cfg.Snapshots.List() {
		if s, err := fromManifest(m); err == nil && s.Auto != "" && !parents[m.ID] && n.neededBy(m.ID) == "" {
			drop(m.ID)
		}
	}
	return append(removed, n.expireSnapshots(n.cfg.Retention)...)
}

// expireSnapshots removes those that users made, did not name, nothing needs, and the rules let go.
func (n *Node) expireSnapshots(rules chunk.Rules) (removed []string) {
	if rules == (chunk.Rules{}) {
		return nil
	}
	var users []snapshot.Manifest
	for _, m := range n.cfg.Snapshots.List() {
		if s, err := fromManifest(m); err == nil && s.Auto == "" {
			users = append(users, m)
		}
	}
	pinned := func(m snapshot.Manifest) bool {
		s, err := fromManifest(m)
		return err != nil || s.Name != "" || n.neededBy(m.ID) != ""
	}
	for _, m := range snapshot.Expired(users, rules, time.Now(), pinned) {
		if err := n.dropSnapshot(m.ID); err != nil {
			n.log.Error("removing a snapshot that has expired", "snapshot", m.ID, "error", err)
			continue
		}
		n.log.Info("removed a snapshot that has expired", "snapshot", m.ID, "created", m.Created)
		removed = append(removed, m.ID)
	}
	return removed
}

// PruneReport says what Prune removed.
type PruneReport struct {
	Sandboxes []string     `json:"sandboxes"` // records of ended ones
	Snapshots []string     `json:"snapshots"`
	Images    image.Pruned `json:"images"`
}

// Prune removes the records of ended sandboxes and everything on disk that
// nothing refers to.
func (n *Node) Prune(ctx context.Context) (PruneReport, error) {
	var report PruneReport
	n.forgetEnded(ctx, 0, func(id string) { report.Sandboxes = append(report.Sandboxes, id) })
	report.Snapshots = n.sweepSnapshots()
	var err error
	report.Images, err = n.cfg.Images.Prune(ctx, n.rootsInUse(), false)
	return report, err
}

// rootsInUse is the set of roots that a sandbox or a snapshot still needs.
func (n *Node) rootsInUse() []string {
	var use []string
	for _, r := range n.records(func(r Sandbox) bool { return live(r.State) }) {
		use = append(use, r.Spec.Root.Digest)
	}
	for _, m := range n.cfg.Snapshots.List() {
		use = append(use, m.Spec.Root.Digest)
	}
	return use
}
