package carry

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// Stored is something in the object store.
type Stored struct {
	Kind    Kind      `json:"kind"`
	ID      string    `json:"id"`
	Names   []string  `json:"names,omitempty"` // that lead to it
	Size    int64     `json:"size"`            // of its content, in bytes
	Created time.Time `json:"created"`         // when it was pushed
	Error   string    `json:"error,omitempty"` // why it cannot be read; ID is then its manifest's, and the rest is not known
}

// stored is the same with what a decision needs.
type stored struct {
	Stored
	line string   // what it is a version of
	refs []string // that lead to it
	m    chunk.Manifest
}

// shelf returns what the object store has, oldest first.
func (c *Carrier) shelf(ctx context.Context) ([]stored, error) {
	v, err := c.store("")
	if err != nil {
		return nil, err
	}
	refs, err := v.Refs(ctx)
	if err != nil {
		return nil, err
	}
	byManifest := make(map[chunk.ID][]string)
	for name, id := range refs {
		byManifest[id] = append(byManifest[id], name)
	}
	var all []stored
	for id, names := range byManifest {
		m, o, err := readStored(ctx, v, id)
		if err != nil && !sandbox.Is(err, sandbox.Invalid) && !sandbox.Is(err, sandbox.NotFound) {
			return nil, err
		}
		s := stored{Stored: Stored{Kind: o.Kind, ID: o.ID, Size: m.Size(), Created: m.Created}, refs: names, m: m}
		if err != nil {
			s.ID, s.Error = id.String(), err.Error()
		} else {
			s.line = o.line()
		}
		for _, name := range o.names() {
			if name != "" && slices.Contains(names, refName(o.Kind, name)) {
				s.Names = append(s.Names, name)
			}
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b stored) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return all, nil
}

// readStored reads what a ref of the object store leads to. It fails with Invalid when that makes no sense.
func readStored(ctx context.Context, v *chunk.Vault, id chunk.ID) (m chunk.Manifest, o offer, err error) {
	if m, err = chunk.GetManifest(ctx, v, id); err != nil {
		return m, o, err
	}
	if err := json.Unmarshal(m.Meta, &o); err != nil || o.check() != nil || len(m.Parts) != len(o.Files) {
		return m, offer{}, sandbox.Errorf("carry.Stored", sandbox.Invalid, id.String(), "what the object store has makes no sense")
	}
	return m, o, nil
}

// line is what something is a version of: a snapshot's sandbox, an image's name without its tag, a model's name.
func (o offer) line() string {
	if o.Kind == Snapshot {
		if m, err := o.snapshot(); err == nil {
			return m.Sandbox
		}
	}
	name, _, _ := strings.Cut(cmp.Or(append(o.names(), o.ID)...), ":")
	return string(o.Kind) + " " + name
}

// Stored lists what is in the object store, oldest first.
func (c *Carrier) Stored(ctx context.Context) ([]Stored, error) {
	all, err := c.shelf(ctx)
	out := make([]Stored, len(all))
	for i, s := range all {
		out[i] = s.Stored
	}
	return out, err
}

// minPrefix is how many letters of an ID are enough, if they are unique.
const minPrefix = 4

// Unstore removes something from the object store, by its ID, the beginning of it, or a name. Its chunks go when they are collected
// and nothing else leads to them.
func (c *Carrier) Unstore(ctx context.Context, ref string) error {
	const op = "carry.Unstore"
	all, err := c.shelf(ctx)
	if err != nil {
		return err
	}
	var found []stored
	for _, s := range all {
		if s.ID == ref || slices.Contains(s.Names, ref) {
			found = []stored{s}
			break
		}
		if len(ref) >= minPrefix && strings.HasPrefix(strings.TrimPrefix(s.ID, "sha256:"), ref) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return sandbox.Errorf(op, sandbox.NotFound, ref, "the object store has nothing of this name").WithHint("`atoll store ls` lists what it has")
	case 1:
		return c.unstore(ctx, found[0])
	}
	return sandbox.Errorf(op, sandbox.Invalid, ref, "%d things in the object store begin so", len(found)).WithHint("write more of the ID")
}

func (c *Carrier) unstore(ctx context.Context, s stored) error {
	for _, ref := range s.refs {
		if err := c.vault.DeleteRef(ctx, ref); err != nil {
			return err
		}
	}
	return nil
}

// expireStored removes from the object store what no name leads to and the rules let go.
func (c *Carrier) expireStored(ctx context.Context, now time.Time) error {
	if c.cfg.StoreRules == (chunk.Rules{}) {
		return nil
	}
	all, err := c.shelf(ctx)
	if err != nil {
		return err
	}
	kept := make([]chunk.Kept, len(all))
	for i, s := range all {
		kept[i] = chunk.Kept{Name: s.ID, Line: s.line, Pinned: len(s.Names) > 0 || s.Error != "", Created: s.Created, Holds: s.m.Content()}
	}
	for _, i := range chunk.Expired(kept, c.cfg.StoreRules, now) {
		if err := c.unstore(ctx, all[i]); err != nil {
			return err
		}
		c.cfg.Log.Info("removed from the object store what has expired", "kind", all[i].Kind, "id", all[i].ID, "created", all[i].Created)
	}
	return nil
}
