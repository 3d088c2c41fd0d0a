package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/llm/engine"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/sandbox"
)

// modelReport is what `atoll bench model -o json` prints.
type modelReport struct {
	Model   string  `json:"model"`
	Threads int     `json:"threads"`
	Prompt  int     `json:"prompt"`
	Answer  int     `json:"answer"`
	Batch   int     `json:"batch"` // texts at once
	At      int     `json:"at"`    // tokens that stand before what is written
	KV      string  `json:"kv"`
	Draft   string  `json:"draft,omitempty"`
	Prefill float64 `json:"prefill_tps"`
	Decode  float64 `json:"decode_tps"` // of all texts together
	Load    float64 `json:"load_s"`     // until all weights are there
	First   float64 `json:"first_s"`    // from the start of loading to the first token of an 8-token prompt
	Bytes   int64   `json:"weight_bytes"`
	Guessed int64   `json:"guessed_tokens"` // ahead
	Right   int64   `json:"guessed_right"`
}

func (a *app) benchModelCommand() *cobra.Command {
	var f modelFlags
	var out format
	var text string
	r := modelReport{}
	cmd := &cobra.Command{
		Use: "model NAME|FILE|URL", Short: "Measure loading, reading and generating with a language model", Args: exact("NAME|FILE|URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if r.Prompt < 1 || r.At < 1 || r.Answer < 2 || r.Batch < 1 || r.Batch > 64 {
				return usageError("", "", "-p and --at must be at least 1, -n at least 2, --batch from 1 to 64")
			}
			if f.window == 0 {
				f.window = max(r.Prompt, r.At) + r.Answer + 1
			}
			var natural string
			if text != "" {
				var err error
				if natural, err = a.textFile(text); err != nil {
					return err
				}
			}
			m, release, err := f.use(cmd.Context(), a, args[0])
			if err != nil {
				return err
			}
			r.Model, r.Threads = m.Name, f.threads
			if r.Threads <= 0 {
				r.Threads = runtime.NumCPU()
			}
			r.KV, r.Draft = f.kv, f.draft
			if err := errors.Join(r.run(cmd.Context(), m, natural), release()); err != nil {
				return err
			}
			if done, err := out.structured(a.stdout, r); done {
				return err
			}
			fmt.Fprintf(a.stdout, "%s with %d threads: read %.1f, wrote %.1f tokens a second (%d at once); loaded in %.2f s, first token after %.2f s\n",
				r.Model, r.Threads, r.Prefill, r.Decode, r.Batch, r.Load, r.First)
			if r.Guessed > 0 {
				fmt.Fprintf(a.stdout, "of %d tokens guessed ahead %.0f %% were right\n", r.Guessed, 100*float64(r.Right)/float64(r.Guessed))
			}
			return nil
		},
	}
	f.add(cmd)
	out.flags(cmd, "")
	cmd.Flags().IntVarP(&r.Prompt, "prompt", "p", 512, "`tokens` to read")
	cmd.Flags().IntVarP(&r.Answer, "answer", "n", 64, "`tokens` to write")
	cmd.Flags().IntVar(&r.Batch, "batch", 1, "`texts` at once")
	cmd.Flags().IntVar(&r.At, "at", 1, "`tokens` that stand before what is written")
	cmd.Flags().StringVar(&text, "text", "", "a `file` whose beginning they are; default random tokens, which no model guesses well after")
	return cmd
}

// run measures with texts of random tokens, which no cache knows, unless one is given to go on with.
func (r *modelReport) run(ctx context.Context, m *llmhost.Model, text string) error {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func(count int) []int32 {
		tokens := make([]int32, count)
		for i := range tokens {
			tokens[i] = int32(rnd.IntN(m.Weights.Config().Vocab))
		}
		return tokens
	}
	if _, err := r.ask(ctx, m, random(min(8, r.Prompt)), 1); err != nil {
		return err
	}
	r.First = time.Since(m.Begun).Seconds()
	if err := m.Weights.Wait(ctx); err != nil {
		return err
	}
	r.Load, r.Bytes = m.Weights.LoadTime().Seconds(), m.Weights.Bytes()
	u, err := r.ask(ctx, m, random(r.Prompt), 1)
	if err != nil {
		return err
	}
	r.Prefill = float64(r.Prompt) / u.First.Seconds()
	before := random(r.At)
	if text != "" {
		if before, err = m.Tokens.Encode(text, true); err != nil {
			return err
		}
		if len(before) < r.At {
			return usageError("", "give a longer text, or fewer with --at", "a text of %d tokens for --at %d", len(before), r.At)
		}
		before = before[:r.At]
	}
	return r.write(ctx, m, before)
}

// write measures writing after a text, by several at once.
func (r *modelReport) write(ctx context.Context, m *llmhost.Model, before []int32) error {
	if _, err := r.ask(ctx, m, before, 1); err != nil { // so that all begin at once, with its pages
		return err
	}
	type result struct {
		u   engine.Usage
		err error
	}
	results := make(chan result, r.Batch)
	for range r.Batch {
		go func() {
			u, err := r.ask(ctx, m, before, r.Answer)
			results <- result{u, err}
		}()
	}
	for range r.Batch {
		got := <-results
		if got.err != nil {
			return sandbox.E("atoll bench model", "", m.Name, got.err)
		}
		r.Decode += float64(got.u.Answer-1) / max(1e-9, (got.u.Total-got.u.First).Seconds())
		r.Guessed, r.Right = r.Guessed+int64(got.u.Guessed), r.Right+int64(got.u.Right)
	}
	return nil
}

// ask has the model write so many tokens after a prompt.
func (r *modelReport) ask(ctx context.Context, m *llmhost.Model, prompt []int32, answer int) (engine.Usage, error) {
	s, err := m.Engine.Submit(ctx, engine.Request{Prompt: prompt, Limit: answer, Endless: true, Likely: -1})
	if err != nil {
		return engine.Usage{}, err
	}
	defer s.Close()
	for {
		if p, err := s.Next(ctx); err != nil || p.Finish != "" {
			return s.Usage(), err
		}
	}
}
