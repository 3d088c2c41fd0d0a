package quant

import (
	"context"
	"errors"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// A Runner is a model in memory that texts are run through one by one, each from its
// beginning. It must not be used from several goroutines at a time.
type Runner struct {
	file  *gguf.Reader
	model *model.Model
	pool  *tensor.Pool
	kv    *cache.Pool
	most  int // tokens of a text
}

// pageLen is how many tokens' keys and values lie together.
const pageLen = 16

// Load opens a model for texts of up to most tokens. tap may be nil; see Activations.
// Errors are those of gguf and model.
func Load(name string, threads, most int, tap func(name string, x []float32, cols int)) (*Runner, error) {
	file, err := gguf.Open(name)
	if err != nil {
		return nil, err
	}
	r := &Runner{file: file, most: most, pool: tensor.NewPool(max(1, threads), tensor.Best())}
	src, err := model.FromGGUFData(file.File, file)
	if err == nil {
		r.model, err = model.Open(src, model.Options{Pool: r.pool, Tap: tap})
	}
	if err == nil {
		r.kv, err = cache.New(r.model.Layout(tensor.F32, pageLen), most/pageLen+1, cache.Root(""))
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Logits is what the model thinks of each next token; see the type Logits.
func (r *Runner) Logits(ctx context.Context, tokens []int32) ([]float32, error) {
	return r.run(ctx, tokens, len(tokens))
}

// run takes a text through the model and returns the logits of its last tokens.
func (r *Runner) run(ctx context.Context, tokens []int32, last int) ([]float32, error) {
	if len(tokens) > r.most {
		return nil, sandbox.Errorf("quant.Logits", sandbox.Invalid, "", "a text of %d tokens, more than %d", len(tokens), r.most)
	}
	seq := r.kv.NewSequence("")
	defer seq.Release()
	if !seq.Grow(len(tokens)) {
		return nil, sandbox.Errorf("quant.Logits", sandbox.Internal, "", "no room for %d tokens", len(tokens))
	}
	out, err := r.model.Forward(ctx, r.kv, &model.Batch{Tokens: tokens,
		Parts: []model.Part{{Pages: seq.Pages(), Tokens: len(tokens), Last: last}}})
	return out.Logits, err
}

// Close frees the model.
func (r *Runner) Close() error {
	var all error
	if r.model != nil {
		all = r.model.Close()
	}
	if r.kv != nil {
		all = errors.Join(all, r.kv.Close())
	}
	r.pool.Close()
	return errors.Join(all, r.file.Close())
}

// Calibrate runs the model of a file over tokens, in windows, each with begin before it
// unless that is negative.
func Calibrate(name string, threads int, tokens []int32, window int, begin int32) Activations {
	return func(ctx context.Context, tap func(name string, x []float32, cols int)) error {
		r, err := Load(name, threads, window+1, tap)
		if err != nil {
			return err
		}
		for rest := tokens; len(rest) >= window && err == nil; rest = rest[window:] {
			text := make([]int32, 0, window+1)
			if begin >= 0 {
				text = append(text, begin)
			}
			_, err = r.run(ctx, append(text, rest[:window]...), 1)
		}
		return errors.Join(err, r.Close())
	}
}
