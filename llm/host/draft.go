package host

import (
	"context"
	"io"

	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
)

// small is the model that guesses for another.
type small struct {
	src     *model.Source
	source  io.Closer
	weights *model.Model // nil until it is opened
	bytes   int64        // predicted for all of it
}

// openSmall finds the model that guesses for m, whose configuration is c. It fails with Invalid unless both have the same tokens.
func (h *Host) openSmall(ctx context.Context, m *Model, c model.Config, ec engine.Config) (*small, error) {
	found := &Model{}
	front, data, err := h.find(ctx, found, h.config.Draft)
	s := &small{source: found.source}
	if err == nil {
		err = h.config.Stretch.Apply(front)
	}
	if err == nil {
		s.src, err = model.FromGGUFData(front, data)
	}
	var tokens *tokenizer.Tokenizer
	if err == nil {
		tokens, err = tokenizer.FromGGUF(&front.Meta)
	}
	if err == nil && (!tokens.Same(m.Tokens) || s.src.Config().Vocab < tokens.Len()) {
		err = sandbox.Errorf("host.openSmall", sandbox.Invalid, h.config.Draft, "its tokens are not those of %s, for which it is to guess", m.Name).
			WithHint("guess by a smaller model of the same family, or by the same model in fewer bits")
	}
	if err == nil {
		s.bytes, err = model.Weights(s.src, model.Shard{})
	}
	if err != nil {
		return nil, sandbox.E("host.openSmall", "", h.config.Draft, s.close(err))
	}
	s.bytes += engine.DraftMemory(c, s.src.Config(), ec)
	return s, nil
}

// close gives all back; it returns err, or else what went wrong.
func (s *small) close(err error) error {
	if s.weights != nil {
		if e := s.weights.Close(); err == nil {
			err = e
		}
	}
	if s.source != nil {
		if e := s.source.Close(); err == nil {
			err = e
		}
	}
	return err
}
