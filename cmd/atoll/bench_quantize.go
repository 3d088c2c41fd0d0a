package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/quant"
)

// quantizeRow is one model that `atoll bench quantize` made and judged.
type quantizeRow struct {
	Format     string  `json:"format"`
	Method     string  `json:"method"`
	Bits       float64 `json:"bits"`       // a weight of the layers, with scales
	Bytes      int64   `json:"bytes"`      // of the file
	Perplexity float64 `json:"perplexity"` // of the held-out text
	Divergence float64 `json:"divergence"` // mean Kullback-Leibler divergence from the model it was made of, in nats
	Agreement  float64 `json:"agreement"`  // how often both find the same token likeliest, 0 to 1
}

// quantizeReport is what `atoll bench quantize -o json` prints.
type quantizeReport struct {
	Model      string        `json:"model"`
	Type       string        `json:"type"`       // of most of the model's weights, as they came
	Bytes      int64         `json:"bytes"`      // of its file
	Calibrated int           `json:"calibrated"` // tokens that gptq and awq read
	Held       int           `json:"held"`       // other tokens, that were predicted
	Perplexity float64       `json:"perplexity"` // of the model as it came
	Rows       []quantizeRow `json:"rows"`
}

// quantizeBench is one run of `atoll bench quantize`.
type quantizeBench struct {
	source           string // the model's file
	threads          int
	calibrate, judge []int32
	begin            int32 // before each window; -1 is nothing
	base             *quant.Runner
}

func (a *app) benchQuantizeCommand() *cobra.Command {
	var out format
	var formats, methods []string
	var threads, calibrated, held int
	cmd := &cobra.Command{
		Use: "quantize NAME TEXT", Short: "Measure what a model loses with fewer bits, by each method", Args: exact("NAME", "TEXT"),
		Long: "Quantize makes a model of each format by each method and compares how they predict text with how the imported model does:\n" +
			"by perplexity and by Kullback-Leibler divergence. gptq and awq are calibrated on the beginning of TEXT, and all are\n" +
			"judged on its end. The models are removed again; `atoll model quantize` makes one to keep.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			info, err := a.modelStore().Info(args[0])
			if err != nil {
				return err
			}
			text, err := a.textFile(args[1])
			if err != nil {
				return err
			}
			recipes, err := recipesOf(formats, methods, threads)
			if err != nil {
				return err
			}
			b := &quantizeBench{source: a.modelStore().Weights(info.Name), threads: recipes[0].Threads}
			if err := b.split(text, calibrated, held); err != nil {
				return err
			}
			r := quantizeReport{Model: info.Name, Type: info.Type, Bytes: info.Bytes, Calibrated: len(b.calibrate)}
			if err := a.measureQuantized(cmd.Context(), b, &r, recipes); err != nil {
				return err
			}
			if done, err := out.structured(a.stdout, r); done {
				return err
			}
			r.print(a)
			return nil
		},
	}
	out.flags(cmd, "")
	fl := cmd.Flags()
	fl.StringSliceVar(&formats, "format", []string{"q8_0", "q4_0", "q3_0"}, "`formats` to make, as those of `atoll model quantize`")
	fl.StringSliceVar(&methods, "method", []string{"rtn", "gptq", "awq"}, "`methods` to compare")
	fl.IntVarP(&threads, "threads", "t", 0, "`threads` that compute; default all CPUs")
	fl.IntVar(&calibrated, "calibrate", 16384, "`tokens` of the text to calibrate on")
	fl.IntVar(&held, "held", 8192, "`tokens` of the rest to judge on")
	return cmd
}

// recipesOf is what there is to make: formats that methods do not apply to are only rounded.
func recipesOf(formats, methods []string, threads int) ([]quant.Recipe, error) {
	if threads <= 0 {
		threads = runtime.NumCPU()
	}
	var list []quant.Recipe
	for _, name := range formats {
		f, err := quant.ParseFormat(name)
		if err != nil {
			return nil, usageError(name, "such as q8_0, q4_0 or q3_0", "%v", err)
		}
		for _, method := range methods {
			switch m := quant.Method(method); {
			case m != quant.RTN && m != quant.GPTQ && m != quant.AWQ:
				return nil, usageError(method, "use rtn, gptq or awq", "method %q is not known", method)
			case m == quant.RTN || f.Calibrated():
				list = append(list, quant.Recipe{Method: m, Format: f, Threads: threads})
			}
		}
	}
	if len(list) == 0 {
		return nil, usageError("", "", "there is nothing to make: gptq and awq are for formats with groups of whole numbers")
	}
	return list, nil
}

// split takes the first tokens of a text to calibrate on and the last to judge.
func (b *quantizeBench) split(text string, calibrated, held int) (err error) {
	r, err := gguf.Open(b.source)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	tokens, begin, err := encode(&r.Meta, text)
	if err != nil {
		return err
	}
	if calibrated < calibrationWindow || held < calibrationWindow || calibrated+held > len(tokens) {
		return usageError("", fmt.Sprintf("give a longer text, or fewer with --calibrate and --held, each at least %d", calibrationWindow),
			"%d tokens to calibrate on and %d to judge of a text of %d", calibrated, held, len(tokens))
	}
	b.calibrate, b.judge, b.begin = tokens[:calibrated], tokens[len(tokens)-held:], begin
	return nil
}

// measureQuantized makes and judges a model by each recipe.
func (a *app) measureQuantized(ctx context.Context, b *quantizeBench, r *quantizeReport, recipes []quant.Recipe) (err error) {
	dir, err := a.modelStore().Scratch()
	if err == nil {
		dir, err = os.MkdirTemp(dir, "bench-")
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if b.base, err = quant.Load(b.source, b.threads, calibrationWindow+1, nil); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.base.Close()) }()
	shown := a.bar("quantizing")
	defer shown.done()
	for i, recipe := range recipes {
		what := fmt.Sprintf("%s by %s, %d of %d", recipe.Format.Name, recipe.Method, i+1, len(recipes))
		shown.report(image.Progress{Stage: what})
		q, bytes, err := b.one(ctx, filepath.Join(dir, "model.gguf"), recipe)
		if err != nil {
			return err
		}
		r.Held, r.Perplexity = q.Tokens, q.Base
		r.Rows = append(r.Rows, quantizeRow{Format: recipe.Format.Name, Method: string(recipe.Method), Bits: recipe.Format.Bits, Bytes: bytes,
			Perplexity: q.Perplexity, Divergence: q.Divergence, Agreement: q.Agreement})
	}
	return nil
}

// one makes a model and judges it.
func (b *quantizeBench) one(ctx context.Context, result string, recipe quant.Recipe) (q quant.Quality, bytes int64, err error) {
	src, err := gguf.Open(b.source)
	if err != nil {
		return q, 0, err
	}
	err = quant.Run(ctx, src, result, recipe, quant.Calibrate(b.source, b.threads, b.calibrate, calibrationWindow, b.begin), nil)
	if err = errors.Join(err, src.Close()); err != nil {
		return q, 0, err
	}
	info, err := os.Stat(result)
	if err != nil {
		return q, 0, err
	}
	made, err := quant.Load(result, b.threads, calibrationWindow+1, nil)
	if err != nil {
		return q, 0, err
	}
	q, err = quant.Measure(ctx, b.judge, calibrationWindow, b.begin, made.Logits, b.base.Logits)
	return q, info.Size(), errors.Join(err, made.Close(), os.Remove(result))
}

func (r *quantizeReport) print(a *app) {
	fmt.Fprintf(a.stdout, "%s, mostly %s, %s, perplexity %.2f over %d tokens; gptq and awq were calibrated on %d others\n\n",
		r.Model, r.Type, formatBytes(r.Bytes), r.Perplexity, r.Held, r.Calibrated)
	fmt.Fprintln(a.stdout, "| format | method | bits a weight | file | perplexity | divergence, nats | same token likeliest |\n|---|---|---|---|---|---|---|")
	for _, row := range r.Rows {
		fmt.Fprintf(a.stdout, "| %s | %s | %.1f | %s | %.2f | %.4f | %.1f %% |\n",
			row.Format, row.Method, row.Bits, formatBytes(row.Bytes), row.Perplexity, row.Divergence, 100*row.Agreement)
	}
}
