package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/llm/engine"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/tensor"
)

// attentionRow is one line of what `atoll bench attention` prints.
type attentionRow struct {
	Length    int     `json:"length"`    // tokens of the text
	Attention string  `json:"attention"` // as --attention
	First     float64 `json:"first_tps"` // tokens a second, reading the text at first
	model.LongText
}

// attentionReport is what `atoll bench attention -o json` prints.
type attentionReport struct {
	Model   string         `json:"model"`
	Window  int            `json:"window"` // for which the model was made
	Threads int            `json:"threads"`
	KV      string         `json:"kv"`
	Read    string         `json:"read"` // the attention by which texts are read at first
	Rows    []attentionRow `json:"rows"`
}

func (a *app) benchAttentionCommand() *cobra.Command {
	var out format
	var f modelFlags
	var lengths []int
	var kinds []string
	var read string
	cmd := &cobra.Command{
		Use: "attention NAME|FILE TEXT", Short: "Measure what full, windowed and sparse attention find in long texts, and how fast", Args: exact("NAME|FILE", "TEXT"),
		Long: "Attention makes texts of each length from a file, hides eight numbers in them, evenly spread, and has the model read each once,\n" +
			"with full attention unless --read says otherwise. Then, for each kind of attention, it asks for the numbers, judges how well the tokens that\n" +
			"follow are predicted, and measures how fast the model reads on and writes.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			text, err := a.textFile(args[1])
			if err != nil {
				return err
			}
			f.window = 64 // texts are kept by the measurement
			m, release, err := f.use(cmd.Context(), a, args[0])
			if err != nil {
				return err
			}
			r := attentionReport{Model: m.Name, Window: m.Weights.Config().Context, Threads: f.threads, KV: f.kv, Read: read}
			if r.Threads <= 0 {
				r.Threads = runtime.NumCPU()
			}
			if err := errors.Join(a.measureAttention(cmd.Context(), m, &r, text, lengths, kinds), release()); err != nil {
				return err
			}
			if done, err := out.structured(a.stdout, r); done {
				return err
			}
			fmt.Fprintf(a.stdout, "%s, made for %d tokens, keys and values in %s, %d threads; texts are read with %s attention\n\n", r.Model, r.Window, r.KV, r.Threads, r.Read)
			fmt.Fprintln(a.stdout, "| text | attention | perplexity | numbers found | nats a token of them | reading | reading on | writing |\n|---|---|---|---|---|---|---|---|")
			for _, row := range r.Rows {
				fmt.Fprintf(a.stdout, "| %d | %s | %.2f | %d of %d | %.2f | %.0f tokens/s | %.0f tokens/s | %.1f tokens/s |\n",
					row.Length, row.Attention, row.Perplexity, row.Found, row.Needles, row.Surprise, row.First, row.Read, row.Write)
			}
			return nil
		},
	}
	out.flags(cmd, "")
	fl := cmd.Flags()
	fl.IntVarP(&f.threads, "threads", "t", 0, "`threads` that compute; default all CPUs")
	fl.StringVar(&f.kv, "kv", "f16", "how keys and values are kept: `f16`, bf16, int8 or int4")
	fl.IntSliceVar(&lengths, "length", []int{4096, 16384, 65536}, "`tokens` of the texts")
	fl.StringSliceVar(&kinds, "attention", []string{"full", "window", "sparse", "sparse:16"}, "`kinds` to compare")
	fl.StringVar(&read, "read", "full", "the `attention` by which texts are read at first, which takes long with full")
	f.attend = "full"
	f.addRope(cmd)
	return cmd
}

// measureAttention fills in the rows.
func (a *app) measureAttention(ctx context.Context, m *llmhost.Model, r *attentionReport, text string, lengths []int, kinds []string) error {
	numbers, err := tensor.ParseKV(r.KV)
	if err != nil {
		return usageError(r.KV, "use f16, bf16, int8 or int4", "--kv: %v", err)
	}
	o := model.LongTextOptions{BOS: m.Tokens.BOS(), Numbers: numbers}
	if o.Read, err = engine.ParseAttention(r.Read); err != nil {
		return err
	}
	for _, kind := range kinds {
		sparse, err := engine.ParseAttention(kind)
		if err != nil {
			return err
		}
		o.Sparse = append(o.Sparse, sparse)
	}
	if o.Text, err = m.Tokens.Encode(text, false); err != nil {
		return err
	}
	if o.Needles, err = needles(m); err != nil {
		return err
	}
	for _, length := range lengths {
		o.Length = length
		shown := a.bar("reading")
		o.Progress = func(done, all int) {
			shown.report(image.Progress{Stage: fmt.Sprintf("%d of %d tokens", done, all)})
		}
		list, first, err := m.Weights.LongText(ctx, o)
		shown.done()
		if err != nil {
			return err
		}
		for i, l := range list {
			r.Rows = append(r.Rows, attentionRow{length, kinds[i], first, l})
		}
	}
	return nil
}

// needles are facts that no text has.
func needles(m *llmhost.Model) ([]model.Needle, error) {
	var list []model.Needle
	for i, place := range strings.Fields("Lisbon Nairobi Osaka Quito Tallinn Perth Dakar Bergen") {
		begin := fmt.Sprintf("\n\nThe secret number of %s is", place)
		number := fmt.Sprintf(" %d", 10_000+(i*7919+4242)%90_000)
		question, err := m.Tokens.Encode(begin, false)
		if err != nil {
			return nil, err
		}
		whole, err := m.Tokens.Encode(begin+number, false)
		if err != nil {
			return nil, err
		}
		fact, err := m.Tokens.Encode(begin+number+".\n\n", false)
		if err != nil {
			return nil, err
		}
		n := min(len(question), len(whole)-1)
		list = append(list, model.Needle{Fact: fact, Question: whole[:n], Answer: whole[n:]})
	}
	return list, nil
}
