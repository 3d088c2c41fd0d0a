package node

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// minPrefix is how many characters of an ID must be given at least, so that a
// mistyped short name does not hit a stranger.
const minPrefix = 3

// find returns the entry that ref names: an ID, a live sandbox's name, or the
// beginning of exactly one ID.
func (n *Node) find(op, ref string) (*entry, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if e, ok := n.entries[ref]; ok {
		return e, nil
	}
	if id, ok := n.names[ref]; ok {
		return n.entries[id], nil
	}
	if e := n.moved(ref); e != nil {
		return e, nil
	}
	var found []*entry
	if len(ref) >= minPrefix {
		for id, e := range n.entries {
			if strings.HasPrefix(id, ref) && !e.rec.hidden() {
				found = append(found, e)
			}
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, sandbox.Errorf(op, sandbox.NotFound, ref, "no such sandbox").WithHint("see `atoll ls -a`")
	}
	return nil, sandbox.Errorf(op, sandbox.Invalid, ref, "%d sandboxes begin with this", len(found)).WithHint("give more of the id")
}

// moved returns the sandbox that had a name when it moved to another node, the last of several. n.mu is held.
func (n *Node) moved(name string) (last *entry) {
	for _, e := range n.entries {
		if e.rec.Moved != "" && e.rec.Name == name && (last == nil || e.rec.EndedAt.After(*last.rec.EndedAt)) {
			last = e
		}
	}
	return last
}

// lock finds a sandbox and takes its op, giving up when ctx ends. The caller
// unlocks e.op.
func (n *Node) lock(ctx context.Context, op, ref string) (*entry, error) {
	e, err := n.find(op, ref)
	if err != nil {
		return nil, err
	}
	if err := e.op.lock(ctx); err != nil {
		return nil, sandbox.E(op, "", ref, err)
	}
	// It may have been removed while we waited.
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.entries[e.rec.ID] != e {
		e.op.unlock()
		return nil, sandbox.Errorf(op, sandbox.NotFound, ref, "no such sandbox")
	}
	return e, nil
}

// record reads an entry's record.
func (n *Node) record(e *entry) Sandbox {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return e.rec
}

// Get returns the sandbox that ref names.
func (n *Node) Get(_ context.Context, ref string) (Sandbox, error) {
	e, err := n.find("node.Get", ref)
	if err != nil {
		return Sandbox{}, err
	}
	return n.record(e), nil
}

// List returns the sandboxes that pass the filter, newest first.
func (n *Node) List(_ context.Context, f Filter) ([]Sandbox, error) {
	out := n.records(func(r Sandbox) bool { return f.match(r) })
	if out == nil {
		out = []Sandbox{} // "[]" in JSON
	}
	slices.SortFunc(out, func(a, b Sandbox) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return out, nil
}

// records returns all records that keep accepts, in no order.
func (n *Node) records(keep func(Sandbox) bool) []Sandbox {
	n.mu.RLock()
	defer n.mu.RUnlock()
	var out []Sandbox
	for e := range maps.Values(n.entries) {
		if keep(e.rec) {
			out = append(out, e.rec)
		}
	}
	return out
}

func (f Filter) match(r Sandbox) bool {
	if r.hidden() || !f.All && r.State == sandbox.Terminated {
		return false
	}
	if f.Team != "" && r.Team != f.Team || f.Template != "" && r.Template != f.Template {
		return false
	}
	if len(f.States) > 0 && !slices.Contains(f.States, r.State) {
		return false
	}
	for k, v := range f.Metadata {
		if got, ok := r.Metadata[k]; !ok || got != v {
			return false
		}
	}
	return true
}
