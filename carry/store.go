package carry

import (
	"context"
	"encoding/json"
	"os"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/fetch"
	"github.com/atoll-run/atoll/sandbox"
)

// Things can be kept in an object store, which is pushed to and pulled from like a node that is called StoreName. There they
// are manifests of chunks, so that what several have in common is kept once. A ref leads to each by its ID, another by its
// name.

// StoreName stands for the object store where a node can be named.
const StoreName = fetch.Store

// refName returns the ref of something by its ID or a name, which have letters that refs have not.
func refName(kind Kind, key string) string {
	return string(kind) + "s/" + chunk.Sum([]byte(key)).String()
}

// names of what is offered.
func (o offer) names() []string {
	var meta struct {
		Names []string `json:"names"` // of an image
		Name  string   `json:"name"`  // of a model
		Meta  struct {
			Name string `json:"name"` // of a snapshot
		} `json:"meta"`
	}
	if json.Unmarshal(o.Meta, &meta) != nil {
		return nil
	}
	return append(meta.Names, meta.Name, meta.Meta.Name)
}

func (c *Carrier) store(ref string) (*chunk.Vault, error) {
	if c.vault == nil {
		return nil, sandbox.Errorf("carry.Store", sandbox.Unsupported, ref, "this node has no object store").WithHint("give it one with `atoll up --store s3://BUCKET`")
	}
	return c.vault, nil
}

// toStore keeps something in the object store.
func (c *Carrier) toStore(ctx context.Context, kind Kind, ref string, report func(Progress)) (Result, error) {
	const op = "carry.Push"
	v, err := c.store(ref)
	if err != nil {
		return Result{}, err
	}
	it, err := c.find(ctx, kind, ref)
	if err != nil {
		return Result{}, err
	}
	began, before := time.Now(), c.cfg.Store.Written()
	lease := v.Lease()
	defer lease.Release()
	o := it.offer
	o.Files = make([]offered, len(it.Files))
	m := chunk.Manifest{Kind: string(kind), Created: began.UTC().Truncate(time.Second)}
	res := Result{ID: o.ID, Size: it.size()}
	for i, f := range it.Files {
		o.Files[i] = offered{Name: f.Name, Size: f.Size, Digest: f.Digest}
		p, err := writeFile(ctx, lease, f.Name, it.paths[i])
		if err == nil && p.Digest != f.Digest {
			err = sandbox.Errorf(op, sandbox.Invalid, f.Name, "the file is not what it was when it was saved")
		}
		if err != nil {
			return res, fail(op, f.Name, sandbox.Internal, err)
		}
		m.Parts = append(m.Parts, p)
		res.Files = append(res.Files, FileResult{Name: f.Name, Size: f.Size, Method: "chunks"})
		res.Wire, res.Took = c.cfg.Store.Written()-before, time.Since(began)
		if report != nil {
			report(Progress{Stage: "sending", Done: m.Size(), Total: res.Size, Wire: res.Wire})
		}
	}
	if m.Meta, err = json.Marshal(o); err != nil {
		return res, sandbox.E(op, sandbox.Internal, ref, err)
	}
	id, err := chunk.PutManifest(ctx, lease, m)
	if err != nil {
		return res, err
	}
	for _, key := range append(o.names(), o.ID) {
		if key == "" {
			continue
		}
		if err := v.SetRef(ctx, refName(kind, key), id); err != nil {
			return res, err
		}
	}
	res.Wire, res.Took = c.cfg.Store.Written()-before, time.Since(began)
	return res, nil
}

func writeFile(ctx context.Context, l *chunk.Lease, name, path string) (chunk.Part, error) {
	f, err := os.Open(path)
	if err != nil {
		return chunk.Part{}, err
	}
	defer f.Close()
	return chunk.WritePart(ctx, l, name, f)
}

// fromStore gets something from the object store, or what others have of it nearer.
func (c *Carrier) fromStore(ctx context.Context, kind Kind, ref string, report func(Progress)) (Result, error) {
	const op = "carry.Pull"
	v, err := c.store(ref)
	if err != nil {
		return Result{}, err
	}
	id, err := v.Ref(ctx, refName(kind, ref))
	if sandbox.Is(err, sandbox.NotFound) {
		return Result{}, sandbox.Errorf(op, sandbox.NotFound, ref, "the object store has no such %s", kind)
	}
	if err != nil {
		return Result{}, err
	}
	m, o, err := readStored(ctx, v, id)
	if err == nil && o.Kind != kind {
		err = sandbox.Errorf(op, sandbox.Invalid, ref, "what the object store has by this name is of kind %s", o.Kind)
	}
	if err != nil {
		return Result{}, err
	}
	byName := make(map[string]chunk.Part)
	for _, p := range m.Parts {
		byName[p.Name] = p
	}
	parts := make([]chunk.Part, len(o.Files))
	for i, f := range o.Files {
		parts[i] = byName[f.Name]
	}
	if have, err := c.have(o); err != nil || have {
		return Result{ID: o.ID, Size: o.size(), Held: o.size()}, err
	}
	s := c.newSession(c.group.ID(), o)
	defer s.close()
	return c.receive(ctx, s, parts, c.fetch.Nearest(ctx, StoreName, digests(o)), report)
}

// SweepStore removes from the object store what has expired, and then what no ref leads to and nobody can be about to need. It
// looks at all of it.
func (c *Carrier) SweepStore(ctx context.Context, now time.Time) error {
	if c.vault == nil {
		return nil
	}
	if err := c.expireStored(ctx, now); err != nil {
		return err
	}
	done, err := c.vault.Collect(ctx, now)
	if err == nil && done.Removed > 0 {
		c.cfg.Log.Info("removed chunks from the object store that nothing leads to", "chunks", done.Removed, "bytes", done.Bytes)
	}
	return err
}
