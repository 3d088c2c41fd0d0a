package model

import (
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Shard is a part of a model: layers First to Last-1, and of each the part that
// Rank has of the heads, of the feed-forward columns and, in the head, of the
// vocabulary, when Ranks share the layers. The shard of layer 0 has the embedding,
// that of the last layer the head.
type Shard struct {
	First, Last int
	Rank, Ranks int
}

// Whole is the shard of everything.
func (c *Config) Whole() Shard { return Shard{Last: c.Layers, Ranks: 1} }

func (s Shard) check(c *Config) error {
	switch {
	case s.First < 0 || s.First >= s.Last || s.Last > c.Layers:
		return sandbox.Errorf("model.Shard", sandbox.Invalid, "", "layers %d to %d of %d", s.First, s.Last, c.Layers)
	case s.Ranks < 1 || s.Rank < 0 || s.Rank >= s.Ranks:
		return sandbox.Errorf("model.Shard", sandbox.Invalid, "", "rank %d of %d", s.Rank, s.Ranks)
	case c.KVHeads%s.Ranks != 0:
		return sandbox.Errorf("model.Shard", sandbox.Unsupported, "", "%d key heads cannot be divided among %d", c.KVHeads, s.Ranks).
			WithHint("use a number of ranks that divides the heads of keys")
	}
	return nil
}

// span is a run of rows or columns.
type span struct{ from, to int }

func (s span) len() int { return s.to - s.from }

// cut is the shard's part of n, in whole units.
func (s Shard) cut(n, unit int) span {
	units := (n + unit - 1) / unit
	return span{min(n, units*s.Rank/s.Ranks*unit), min(n, units*(s.Rank+1)/s.Ranks*unit)}
}

// heads is the shard's part of n heads of the model's dimension, in rows.
func (s Shard) heads(n, dim int) span {
	return span{n / s.Ranks * s.Rank * dim, n / s.Ranks * (s.Rank + 1) * dim}
}

func (s Shard) embeds() bool             { return s.First == 0 }
func (s Shard) concludes(c *Config) bool { return s.Last == c.Layers }

// vocabulary is the rows of the head that the shard computes.
func (s Shard) vocabulary(c *Config) span { return s.cut(c.Vocab, tensor.Lanes) }
