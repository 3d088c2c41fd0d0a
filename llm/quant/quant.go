// Package quant makes models smaller: it writes a GGUF file again with fewer bits
// for each weight.
//
// Three methods choose what a weight becomes. Rounding (RTN) takes each weight for
// itself. GPTQ goes over the inputs of a matrix one by one and makes up for the
// error of each in those that follow, as the model's own activations weigh them. AWQ
// scales the inputs that matter up before rounding, and what produces them down, so
// that the model stays the same but for smaller errors. The result is a common file
// with common block types, whichever method made it.
package quant

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// A Method is how numbers are rounded.
type Method string

// The methods.
const (
	RTN  Method = "rtn"
	GPTQ Method = "gptq"
	AWQ  Method = "awq"
)

// A Recipe says what to make.
type Recipe struct {
	Method Method
	Format Format
	// Embedding is the type of the embedding and the head, which every token goes
	// through; the zero value (F32) means Q8_0, or F16 in 16-bit files.
	Embedding tensor.Type
	Threads   int // that compute; 0 is 1
	// Calibration names the text of GPTQ and AWQ: a run that was interrupted with another is not gone on with. It may be empty.
	Calibration string
}

// Activations runs a model over text that is like what it will be used on, and shows
// what goes into the linear parts of its layers, [tokens][cols], by the name of the
// first tensor that takes it. See model.Options.Tap.
type Activations func(ctx context.Context, tap func(name string, x []float32, cols int)) error

// Progress is told what is done: layers of all, the embedding and the rest being one
// more.
type Progress func(done, all int)

// check refuses recipes that make no sense.
func (r *Recipe) check(activations Activations) error {
	switch r.Method {
	case RTN:
	case GPTQ, AWQ:
		if activations == nil {
			return fmt.Errorf("%s needs text to calibrate on", r.Method)
		}
		if !r.Format.Calibrated() {
			return fmt.Errorf("%s is not defined for %s, only for formats with groups of whole numbers", r.Method, r.Format.Name)
		}
	default:
		return fmt.Errorf("method %q is not known, only %s, %s and %s", r.Method, RTN, GPTQ, AWQ)
	}
	if r.Format.Name == "" {
		return fmt.Errorf("no format")
	}
	if r.Embedding != tensor.F32 && !r.Embedding.Known() {
		return fmt.Errorf("%v is no type for an embedding", r.Embedding)
	}
	if r.Embedding == tensor.F32 {
		r.Embedding = tensor.Q8_0
		if r.Format.Type == tensor.F16 || r.Format.Type == tensor.BF16 {
			r.Embedding = r.Format.Type
		}
	}
	return nil
}

// Run writes a model anew. It goes layer by layer, each of which is kept beside the
// result when it is done, so that a run that was interrupted goes on where it was: with
// the same source and recipe, nothing is computed twice. activations may be nil for
// RTN. Errors are Invalid, Unsupported and Canceled; what was done stays for the next
// run.
func Run(ctx context.Context, src *gguf.Reader, result string, r Recipe, activations Activations, progress Progress) error {
	const op = "quant.Run"
	if err := r.check(activations); err != nil {
		return sandbox.E(op, sandbox.Invalid, result, err)
	}
	if progress == nil {
		progress = func(int, int) {}
	}
	job := &job{src: src, recipe: r, layers: layersOf(src.File), pool: tensor.NewPool(max(1, r.Threads), tensor.Best())}
	defer job.pool.Close()
	parts, err := openParts(result+".parts", job.fingerprint())
	if err != nil {
		return sandbox.E(op, "", result, err)
	}
	missing := parts.missing(len(job.layers))
	progress(len(job.layers)-len(missing), len(job.layers))
	if r.Method != RTN && len(missing) > 0 {
		if job.stats, err = collect(ctx, job.pool, r.Method == GPTQ, activations); err != nil {
			return sandbox.E(op, "", result, err)
		}
	}
	for i, n := range missing {
		if err := ctx.Err(); err != nil {
			return sandbox.E(op, sandbox.Canceled, result, err)
		}
		tensors, err := job.layer(job.layers[n])
		if err == nil {
			err = parts.put(n, tensors)
		}
		if err != nil {
			return sandbox.E(op, "", result, err)
		}
		progress(len(job.layers)-len(missing)+i+1, len(job.layers))
	}
	if err := job.assemble(result, parts); err != nil {
		return sandbox.E(op, "", result, err)
	}
	return parts.remove()
}

// A job is one run.
type job struct {
	src    *gguf.Reader
	recipe Recipe
	layers []layer
	stats  map[string]*stat
	pool   *tensor.Pool
}

// A layer is the tensors of one layer of the model, in the order of the file; the
// last one is what is in none.
type layer struct {
	prefix  string // e.g. "blk.3."; empty for the rest
	tensors []*gguf.Tensor
}

func layersOf(f *gguf.File) []layer {
	byPrefix := map[string]int{}
	var layers []layer
	var rest layer
	for i := range f.Tensors {
		t := &f.Tensors[i]
		block, number, _ := cut3(t.Name)
		if block != "blk" {
			rest.tensors = append(rest.tensors, t)
			continue
		}
		prefix := "blk." + number + "."
		at, ok := byPrefix[prefix]
		if !ok {
			at = len(layers)
			byPrefix[prefix] = at
			layers = append(layers, layer{prefix: prefix})
		}
		layers[at].tensors = append(layers[at].tensors, t)
	}
	return append(layers, rest)
}

// cut3 splits a name at its first two points.
func cut3(name string) (first, second, rest string) {
	first, rest, _ = strings.Cut(name, ".")
	second, rest, _ = strings.Cut(rest, ".")
	return first, second, rest
}

// target returns the type that a tensor will have.
func (j *job) target(t *gguf.Tensor) tensor.Type {
	switch {
	case len(t.Dims) != 2 || !strings.HasSuffix(t.Name, ".weight") || strings.HasSuffix(t.Name, "_norm.weight"):
		return tensor.F32
	case t.Name == "token_embd.weight" || t.Name == "output.weight":
		return fitting(j.recipe.Embedding, t.Cols())
	}
	return fitting(j.recipe.Format.Type, t.Cols())
}

// fitting returns a type whose blocks divide rows of cols numbers.
func fitting(typ tensor.Type, cols int) tensor.Type {
	for _, t := range []tensor.Type{typ, tensor.Q8_0} {
		if cols%t.BlockLen() == 0 {
			return t
		}
	}
	return tensor.F16
}

// load returns a tensor as floats.
func (j *job) load(t *gguf.Tensor) ([]float32, error) {
	raw := make([]byte, t.Size)
	if _, err := io.ReadFull(j.src.Section(t), raw); err != nil {
		return nil, err
	}
	out := make([]float32, t.Elements())
	return out, tensor.Dequantise(out, t.Type, raw)
}
