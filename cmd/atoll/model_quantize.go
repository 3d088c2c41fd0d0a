package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"
	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/llm/gguf"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/llm/quant"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
)

// calibrationWindow is the tokens of a piece of text that a model is calibrated on.
const calibrationWindow = 256

func (a *app) modelQuantizeCommand() *cobra.Command {
	var method, text, name string
	var threads, most int
	cmd := &cobra.Command{
		Use: "quantize NAME FORMAT", Short: "Make a model with fewer bits of another", Args: exact("NAME", "FORMAT"),
		Long: "Quantize writes an imported model anew, as NAME-FORMAT unless --name says otherwise. rtn rounds each weight by\n" +
			"itself; gptq and awq read text that is like what the model will be used on. An interrupted run goes on where it\n" +
			"was when it is started again.",
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := quant.ParseFormat(args[1])
			if err != nil {
				return usageError(args[1], "such as q8_0, q4_k or q4_0", "%v", err)
			}
			info, err := a.modelStore().Info(args[0])
			if err != nil {
				return err
			}
			if name == "" {
				name = llmhost.NameOf(info.Name + "-" + args[1])
			}
			switch quant.Method(method) {
			case quant.RTN, quant.GPTQ, quant.AWQ:
			default:
				return usageError(method, "use rtn, gptq or awq", "--method: %q is not known", method)
			}
			recipe := quant.Recipe{Method: quant.Method(method), Format: f, Threads: threads}
			if threads <= 0 {
				recipe.Threads = runtime.NumCPU()
			}
			made, err := a.quantize(cmd.Context(), info.Name, name, text, most, recipe)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.stdout, made.Name)
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&method, "method", string(quant.RTN), "`rtn`, gptq or awq")
	fl.StringVar(&text, "calibration", "", "a `file` of text for gptq and awq")
	fl.IntVar(&most, "tokens", 32768, "how many `tokens` of that text to read")
	fl.StringVar(&name, "name", "", "what to call the result")
	fl.IntVarP(&threads, "threads", "t", 0, "`threads` that compute; default all CPUs")
	return cmd
}

// quantize writes the model from as one called to.
func (a *app) quantize(ctx context.Context, from, to, text string, most int, recipe quant.Recipe) (info llmhost.Info, err error) {
	store := a.modelStore()
	if _, err := store.Info(to); err == nil { // rather than after all the work
		return info, sandbox.Errorf("atoll model quantize", sandbox.Exists, to, "there is a model of this name").
			WithHint("choose another with --name, or remove it with `atoll model rm " + to + "`")
	}
	path := store.Weights(from)
	r, err := gguf.Open(path)
	if err != nil {
		return info, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	shown := a.bar("quantizing")
	defer shown.done()
	var activations quant.Activations
	if recipe.Method != quant.RTN {
		tokens, begin, err := a.calibration(&r.Meta, text, most)
		if err != nil {
			return info, err
		}
		recipe.Calibration = fmt.Sprintf("%x", blake3.Sum256(fmt.Append(nil, tokens)))
		read := quant.Calibrate(path, recipe.Threads, tokens, calibrationWindow, begin)
		activations = func(ctx context.Context, tap func(name string, x []float32, cols int)) error {
			shown.report(image.Progress{Stage: fmt.Sprintf("reading %d tokens", len(tokens))})
			return read(ctx, tap)
		}
	}
	dir, err := store.Scratch()
	if err != nil {
		return info, err
	}
	result := filepath.Join(dir, to+".gguf") // a fixed place, where an interrupted run finds what it has done
	err = quant.Run(ctx, r, result, recipe, activations, func(done, all int) {
		shown.report(image.Progress{Stage: fmt.Sprintf("layer %d of %d", done, all)})
	})
	if err != nil {
		return info, err
	}
	info, err = store.Import(ctx, result, to, nil)
	return info, errors.Join(err, os.Remove(result))
}

// calibration is the first tokens of a file, and what begins a text.
func (a *app) calibration(m *gguf.Meta, file string, most int) (tokens []int32, begin int32, err error) {
	if file == "" {
		return nil, 0, usageError("", "name a file of text that is like what the model will be used on with --calibration", "gptq and awq need text to calibrate on")
	}
	text, err := a.textFile(file)
	if err != nil {
		return nil, 0, err
	}
	if tokens, begin, err = encode(m, text); err != nil {
		return nil, 0, err
	}
	if len(tokens) < calibrationWindow || most < calibrationWindow {
		return nil, 0, usageError(file, "some ten thousand are good", "%d tokens to calibrate on, at least %d are needed", min(len(tokens), most), calibrationWindow)
	}
	return tokens[:min(len(tokens), most)], begin, nil
}

// encode makes tokens of a text by a model that is not in memory, and says what begins one, -1 being nothing.
func encode(m *gguf.Meta, text string) (tokens []int32, begin int32, err error) {
	t, err := tokenizer.FromGGUF(m)
	if err != nil {
		return nil, 0, err
	}
	tokens, err = t.Encode(text, false)
	return tokens, t.BOS(), err
}
