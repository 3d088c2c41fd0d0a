package model

import (
	"math"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
)

// A Stretch lets a model read texts longer than those it was made for, at a cost in how well it understands: positions are
// counted in smaller steps. The zero value changes nothing.
type Stretch struct {
	Kind   string  // linear or yarn
	Factor float64 // the new context over the model's
}

// ParseStretch reads KIND:FACTOR; "" is none.
func ParseStretch(s string) (Stretch, error) {
	if s == "" {
		return Stretch{}, nil
	}
	kind, number, _ := strings.Cut(s, ":")
	factor, err := strconv.ParseFloat(number, 64)
	if err != nil || kind != "linear" && kind != "yarn" || !(factor > 1) || factor > 64 {
		return Stretch{}, sandbox.Errorf("model.ParseStretch", sandbox.Invalid, "", "%.40q is neither linear:FACTOR nor yarn:FACTOR, with a factor above 1 and at most 64", s)
	}
	return Stretch{kind, factor}, nil
}

// String is what ParseStretch reads.
func (s Stretch) String() string {
	if s.Kind == "" {
		return ""
	}
	return s.Kind + ":" + strconv.FormatFloat(s.Factor, 'g', -1, 64)
}

// Apply changes what the metadata of a file says of positions and context. It fails with Unsupported for a model that is
// stretched as it comes.
func (s Stretch) Apply(f *gguf.File) error {
	if s.Kind == "" {
		return nil
	}
	m := &meta{m: &f.Meta, arch: f.Architecture()}
	context := m.int("context_length", -1)
	if m.missing != "" {
		return sandbox.Errorf("model.Stretch", sandbox.Invalid, m.arch, "%s is missing or out of bounds", m.missing)
	}
	kind, _ := f.Meta.String(m.arch + ".rope.scaling.type")
	if kind != "" && kind != "none" || m.float("rope.scaling.factor", m.float("rope.scale_linear", 1)) != 1 || f.Tensor("rope_freqs.weight") != nil {
		return sandbox.Errorf("model.Stretch", sandbox.Unsupported, m.arch, "its positions are scaled as it comes").WithHint("use it without --rope")
	}
	if err := f.Meta.Set(m.arch+".rope.scaling.type", s.Kind); err != nil {
		return err
	}
	if err := f.Meta.Set(m.arch+".rope.scaling.factor", s.Factor); err != nil {
		return err
	}
	if err := f.Meta.Set(m.arch+".rope.scaling.original_context_length", uint32(context)); err != nil {
		return err
	}
	return f.Meta.Set(m.arch+".context_length", uint32(min(maxContext, math.Round(float64(context)*s.Factor))))
}
