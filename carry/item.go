package carry

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// item is something to be sent: an offer and where its files and their bases are.
type item struct {
	offer
	paths []string            // of offer.Files
	bases map[chunk.ID]string // path of every base that is offered
}

// find returns the item with a name or ID.
func (c *Carrier) find(ctx context.Context, kind Kind, ref string) (*item, error) {
	switch kind {
	case Snapshot:
		s, err := c.cfg.Node.GetSnapshot(ctx, ref)
		if err != nil {
			return nil, err
		}
		return c.snapshotItem(s.ID)
	case Image:
		return c.imageItem(ref)
	case Model:
		return c.modelItem(ref)
	}
	return nil, sandbox.Errorf("carry.Find", sandbox.Invalid, ref, "there is no kind %.20q", kind)
}

func (c *Carrier) snapshotItem(id string) (*item, error) {
	const op = "carry.Offer"
	m, err := c.cfg.Snapshots.Get(id)
	if err != nil {
		return nil, err
	}
	if err := node.Portable(m); err != nil {
		return nil, err
	}
	dir := c.cfg.Snapshots.Dir(id)
	for i, f := range m.Files {
		if f.Digest == "" { // it was made for a moment, and not hashed
			d, err := c.hash(filepath.Join(dir, filepath.FromSlash(f.Name)))
			if err != nil {
				return nil, fail(op, id, sandbox.Internal, err)
			}
			m.Files[i].Digest = named(d)
		}
	}
	meta, err := json.Marshal(m)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, id, err)
	}
	it := &item{offer: offer{Kind: Snapshot, ID: id, Meta: meta}, bases: make(map[chunk.ID]string)}
	if err := c.addRoot(it, m.Spec.Root); err != nil {
		return nil, err
	}
	older := c.related(m)
	for _, f := range m.Files {
		d, err := digestOf(f.Digest)
		if err != nil {
			return nil, sandbox.E(op, sandbox.Internal, id, err)
		}
		o := offered{Name: statePrefix + f.Name, Size: f.Size, Digest: d}
		for _, b := range append(older, m) { // in the end, what a part of the same is upon: "memory" for "memory1"
			for _, old := range b.Files {
				base, err := digestOf(old.Digest)
				same := old.Name == f.Name && b.ID != m.ID || b.ID == m.ID && old.Name != f.Name && strings.HasPrefix(f.Name, old.Name)
				if !same || old.Size == 0 || err != nil || len(o.Bases) == maxBases {
					continue
				}
				o.Bases = append(o.Bases, base)
				it.bases[base] = filepath.Join(c.cfg.Snapshots.Dir(b.ID), filepath.FromSlash(old.Name))
			}
		}
		it.Files = append(it.Files, o)
		it.paths = append(it.paths, filepath.Join(dir, filepath.FromSlash(f.Name)))
	}
	return it, nil
}

// related returns the snapshots that have the most in common with m, the best first: older ones of the same sandbox from the
// newest, those that it came from, and others on the same root.
func (c *Carrier) related(m snapshot.Manifest) []snapshot.Manifest {
	all := c.cfg.Snapshots.List() // oldest first
	ancestors := make(map[string]bool)
	for _, a := range snapshot.Lineage(all, m.ID) {
		ancestors[a.ID] = true
	}
	var ranks [3][]snapshot.Manifest
	for i := len(all) - 1; i >= 0; i-- {
		o := all[i]
		switch {
		case o.ID == m.ID || o.Runtime != m.Runtime:
		case o.Sandbox == m.Sandbox:
			ranks[0] = append(ranks[0], o)
		case ancestors[o.ID]:
			ranks[1] = append(ranks[1], o)
		case o.Spec.Root.Digest == m.Spec.Root.Digest:
			ranks[2] = append(ranks[2], o)
		}
	}
	return append(append(ranks[0], ranks[1]...), ranks[2]...)
}

func (c *Carrier) imageItem(ref string) (*item, error) {
	const op = "carry.Offer"
	i, err := c.cfg.Images.Get(ref)
	if err != nil {
		return nil, err
	}
	if i.Root.Kind != sandbox.RootEROFS {
		return nil, sandbox.Errorf(op, sandbox.Unsupported, ref, "the host's own system and disk images do not leave their node")
	}
	meta, err := json.Marshal(i)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, ref, err)
	}
	it := &item{offer: offer{Kind: Image, ID: i.ID, Meta: meta}, bases: make(map[chunk.ID]string)}
	return it, c.addRoot(it, i.Root)
}

// addRoot adds the root to an item, with other images' roots as bases: those with a name of the same repository first.
func (c *Carrier) addRoot(it *item, root sandbox.Root) error {
	const op = "carry.Offer"
	d, err := digestOf(root.Digest)
	if err != nil {
		return sandbox.E(op, sandbox.Unsupported, it.ID, err)
	}
	info, err := os.Stat(root.Path)
	if err != nil {
		return sandbox.E(op, sandbox.NotFound, it.ID, err).WithHint("its image is gone: pull or build it again")
	}
	images, err := c.cfg.Images.List()
	if err != nil {
		return err
	}
	var same string
	for _, i := range images {
		if i.Root.Digest == root.Digest && len(i.Names) > 0 {
			same = repository(i)
		}
	}
	o := offered{Name: rootName, Size: info.Size(), Digest: d}
	for _, near := range []bool{true, false} {
		for _, i := range images {
			base, err := digestOf(i.Root.Digest)
			_, taken := it.bases[base]
			if err != nil || base == d || taken || len(o.Bases) == maxBases || (repository(i) == same) != near {
				continue
			}
			o.Bases = append(o.Bases, base)
			it.bases[base] = i.Root.Path
		}
	}
	it.Files = append(it.Files, o)
	it.paths = append(it.paths, root.Path)
	return nil
}

// repository is an image's first name without its tag; empty for one without a name.
func repository(i image.Image) string {
	if len(i.Names) == 0 {
		return ""
	}
	name, _, _ := strings.Cut(i.Names[0], ":")
	return name
}

// held finds files of this node by their digests.
func (c *Carrier) held() map[chunk.ID]string {
	out := make(map[chunk.ID]string)
	for _, m := range c.cfg.Snapshots.List() {
		for _, f := range m.Files {
			if d, err := digestOf(f.Digest); err == nil && f.Size > 0 {
				out[d] = filepath.Join(c.cfg.Snapshots.Dir(m.ID), filepath.FromSlash(f.Name))
			}
		}
		if d, err := digestOf(m.Spec.Root.Digest); err == nil {
			out[d] = m.Spec.Root.Path
		}
	}
	for digest, path := range c.cfg.Node.Holds() {
		if d, err := digestOf(digest); err == nil {
			out[d] = path
		}
	}
	images, err := c.cfg.Images.List()
	if err != nil {
		c.cfg.Log.Warn("listing images", "error", err)
	}
	for _, i := range images {
		if d, err := digestOf(i.Root.Digest); err == nil {
			out[d] = i.Root.Path
		}
	}
	for _, m := range c.models() {
		if d, err := digestOf(m.Digest); err == nil {
			out[d] = c.cfg.Models.Weights(m.Name)
		}
	}
	return out
}

// file finds one file of this node by its digest.
func (c *Carrier) file(digest chunk.ID) (string, bool) {
	path, ok := c.held()[digest]
	return path, ok
}

// hash returns the digest of a file that nobody changes, and remembers it.
func (c *Carrier) hash(path string) (chunk.ID, error) {
	c.mu.Lock()
	d, ok := c.digests[path]
	c.mu.Unlock()
	if ok {
		return d, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return d, err
	}
	h := blake3.New()
	_, err = io.Copy(h, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return d, err
	}
	h.Sum(d[:0])
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.digests) >= maxDigests {
		clear(c.digests)
	}
	c.digests[path] = d
	return d, nil
}
