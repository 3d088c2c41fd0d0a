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
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/llm/quant"
	"github.com/atoll-run/atoll/llm/tokenizer"
)

// calibrationWindow is the tokens of a piece of text that a model is calibrated on.
const calibrationWindow = 256

func (a *app) modelQuantizeCommand() *cobra.Command {
	var method, text, name string
	var threads int
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
			recipe := quant.Recipe{Method: quant.Method(method), Format: f, Threads: threads}
			if threads <= 0 {
				recipe.Threads = runtime.NumCPU()
			}
			made, err := a.quantize(cmd.Context(), info.Name, name, text, recipe)
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
	fl.StringVar(&name, "name", "", "what to call the result")
	fl.IntVarP(&threads, "threads", "t", 0, "`threads` that compute; default all CPUs")
	return cmd
}

// quantize writes the model from as one called to.
func (a *app) quantize(ctx context.Context, from, to, text string, recipe quant.Recipe) (info llmhost.Info, err error) {
	store := a.modelStore()
	path := store.Weights(from)
	r, err := gguf.Open(path)
	if err != nil {
		return info, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var activations quant.Activations
	if text != "" {
		content, err := a.textFile(text)
		if err != nil {
			return info, err
		}
		t, err := tokenizer.FromGGUF(&r.Meta)
		if err != nil {
			return info, err
		}
		tokens, err := t.Encode(content, false)
		if err != nil {
			return info, err
		}
		activations = quant.Calibrate(path, recipe.Threads, tokens, calibrationWindow, t.BOS())
	}
	// A fixed place, where an interrupted run finds what it has done.
	dir := filepath.Join(filepath.Dir(filepath.Dir(path)), ".quantize")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return info, err
	}
	result := filepath.Join(dir, to+".gguf")
	shown := a.bar("quantizing")
	err = quant.Run(ctx, r, result, recipe, activations, func(done, all int) {
		shown.report(image.Progress{Stage: fmt.Sprintf("layer %d of %d", done, all)})
	})
	shown.done()
	if err != nil {
		return info, err
	}
	info, err = store.Import(ctx, result, to, nil)
	return info, errors.Join(err, os.Remove(result))
}
