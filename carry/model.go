package carry

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/sandbox"
)

// models of this node; none where there is no store of them, or it cannot be read.
func (c *Carrier) models() []host.Info {
	if c.cfg.Models == nil {
		return nil
	}
	all, err := c.cfg.Models.List()
	if err != nil {
		c.cfg.Log.Warn("listing models", "error", err)
	}
	return all
}

// modelItem offers a model, with others of the same family and size as bases: those of as many bytes, such as another step of
// the same training, first.
func (c *Carrier) modelItem(name string) (*item, error) {
	const op = "carry.Offer"
	if c.cfg.Models == nil {
		return nil, sandbox.Errorf(op, sandbox.NotFound, name, "this node has no models")
	}
	m, err := c.cfg.Models.Info(name)
	if err != nil {
		return nil, err
	}
	digest, err := digestOf(m.Digest)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, name, err)
	}
	meta, err := json.Marshal(m)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, name, err)
	}
	path := c.cfg.Models.Weights(name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, sandbox.E(op, sandbox.NotFound, name, err).WithHint("its weights are gone: import it again")
	}
	it := &item{offer: offer{Kind: Model, ID: name, Meta: meta}, paths: []string{path}, bases: make(map[chunk.ID]string)}
	o := offered{Name: weightsName, Size: info.Size(), Digest: digest}
	for _, same := range []bool{true, false} {
		for _, other := range c.models() {
			base, err := digestOf(other.Digest)
			_, taken := it.bases[base]
			alike := other.Family == m.Family && other.Parameters == m.Parameters && (other.Bytes == m.Bytes) == same
			if err != nil || base == digest || taken || !alike || len(o.Bases) == maxBases {
				continue
			}
			o.Bases = append(o.Bases, base)
			it.bases[base] = c.cfg.Models.Weights(other.Name)
		}
	}
	it.Files = []offered{o}
	return it, nil
}

// model is the record in an offer.
func (o offer) model() (host.Info, error) {
	var m host.Info
	err := json.Unmarshal(o.Meta, &m)
	if err == nil && (m.Name != o.ID || len(o.Files) != 1 || o.Files[0].Name != weightsName || named(o.Files[0].Digest) != m.Digest) {
		err = errors.New("the file is not that of its record")
	}
	if err != nil {
		return m, sandbox.E("carry.Offer", sandbox.Invalid, o.ID, err)
	}
	return m, nil
}

func (c *Carrier) haveModel(m host.Info) (bool, error) {
	if c.cfg.Models == nil {
		return false, sandbox.Errorf("carry.Offer", sandbox.Unsupported, m.Name, "the receiving node keeps no models")
	}
	return c.cfg.Models.Has(m.Name, m.Digest)
}

func (c *Carrier) rebuildModel(ctx context.Context, s *session, fill filler) error {
	m, err := s.offer.model()
	if err != nil {
		return err
	}
	return c.cfg.Models.Receive(ctx, m, func(ctx context.Context, path string) error {
		if s.terms[0].Held {
			return link(s.here[0], path)
		}
		return fill(ctx, 0, path)
	})
}
