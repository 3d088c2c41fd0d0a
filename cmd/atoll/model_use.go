package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/llm/chat"
	"github.com/atoll-run/atoll/llm/engine"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/llm/model"
)

func copyUpTo(w io.Writer, r io.Reader, limit int64) (int64, error) {
	return io.Copy(w, io.LimitReader(r, limit+1))
}

func (a *app) modelChatCommand() *cobra.Command {
	var f modelFlags
	var system string
	var sampling engine.Sampling
	var limit int
	var seed uint64
	cmd := &cobra.Command{
		Use: "chat NAME|FILE|URL [PROMPT]", Short: "Talk to a model here", Args: cobra.RangeArgs(1, 2),
		Long: "Chat asks for one message after the other and prints the answers as they are generated. With PROMPT it answers\n" +
			"that and ends. A model without a chat template continues the text as it is.",
		RunE: func(cmd *cobra.Command, args []string) error {
			m, release, err := f.use(cmd.Context(), a, args[0])
			if err != nil {
				return err
			}
			if !cmd.Flags().Changed("seed") {
				seed = rand.Uint64()
			}
			sampling.Seed = seed
			c := &conversation{a: a, m: m, sampling: sampling, limit: limit}
			if system != "" {
				c.say("system", system)
			}
			if len(args) == 2 {
				err = c.answer(cmd.Context(), args[1])
			} else {
				err = c.loop(cmd.Context())
			}
			return errors.Join(err, release())
		},
	}
	f.add(cmd)
	fl := cmd.Flags()
	fl.StringVar(&system, "system", "", "a `message` before the conversation")
	fl.Float32Var(&sampling.Temperature, "temperature", 0.7, "0 always takes the likeliest token")
	fl.Float32Var(&sampling.TopP, "top-p", 0.95, "only the likeliest tokens that together have this `probability`")
	fl.IntVar(&sampling.TopK, "top-k", 0, "only the likeliest so many `tokens`")
	fl.Float32Var(&sampling.MinP, "min-p", 0.05, "only tokens at least this likely, as a `part` of the likeliest")
	fl.Float32Var(&sampling.Repetition, "repetition-penalty", 1, "above 1 makes tokens seen lately less likely")
	fl.Uint64Var(&seed, "seed", 0, "the same `number` gives the same answers; default: another each time")
	fl.IntVarP(&limit, "limit", "n", 0, "`tokens` of an answer at most")
	return cmd
}

// conversation is a chat on the terminal.
type conversation struct {
	a        *app
	m        *llmhost.Model
	sampling engine.Sampling
	limit    int
	messages []map[string]string
}

func (c *conversation) say(role, content string) {
	c.messages = append(c.messages, map[string]string{"role": role, "content": content})
}

func (c *conversation) loop(ctx context.Context) error {
	_, terminal := isTerminal(c.a.stdin)
	lines := bufio.NewScanner(c.a.stdin)
	lines.Buffer(nil, 16<<20)
	for {
		if terminal {
			fmt.Fprint(c.a.stdout, "> ")
		}
		if !lines.Scan() {
			return lines.Err()
		}
		if text := strings.TrimSpace(lines.Text()); text != "" {
			if err := c.answer(ctx, text); err != nil {
				return err
			}
		}
	}
}

// answer asks the model and prints what it says.
func (c *conversation) answer(ctx context.Context, text string) error {
	c.say("user", text)
	prompt := text
	if c.m.Template != nil {
		messages, err := json.Marshal(c.messages)
		if err != nil {
			return err
		}
		prompt, err = c.m.Template.Render(chat.Conversation{Messages: messages, Answer: true, Now: time.Now(),
			BOS: c.m.Tokens.Name(c.m.Tokens.BOS()), EOS: c.m.Tokens.Name(c.m.Tokens.EOS())})
		if err != nil {
			return err
		}
	}
	tokens, err := c.m.Tokens.EncodePrompt(prompt, c.m.Template != nil)
	if err != nil {
		return err
	}
	s, err := c.m.Engine.Submit(ctx, engine.Request{Prompt: tokens, Limit: c.limit, Sampling: c.sampling, Likely: -1})
	if err != nil {
		return err
	}
	defer s.Close()
	var said strings.Builder
	for {
		p, err := s.Next(ctx)
		if err != nil {
			fmt.Fprintln(c.a.stdout)
			return err
		}
		said.WriteString(p.Text)
		fmt.Fprint(c.a.stdout, p.Text)
		if p.Finish != "" {
			break
		}
	}
	fmt.Fprintln(c.a.stdout)
	c.say("assistant", said.String())
	if c.a.interactive {
		u := s.Usage()
		fmt.Fprintf(c.a.stderr, "[%d+%d tokens, first after %v, %.1f a second]\n", u.Prompt, u.Answer, u.First.Round(time.Millisecond),
			float64(u.Answer-1)/max(1e-9, (u.Total-u.First).Seconds()))
	}
	return nil
}

func (a *app) modelPerplexityCommand() *cobra.Command {
	var f modelFlags
	var out format
	var chunk, limit int
	cmd := &cobra.Command{
		Use: "perplexity NAME|FILE TEXT", Short: "Measure how well a model predicts a text", Args: exact("NAME|FILE", "TEXT"),
		Long: "Perplexity cuts a text into chunks, which the model reads each by itself, and takes the mean over the second half of\n" +
			"each, as llama.cpp does. Lower is better; only figures of the same text and the same chunks compare.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			text, err := a.textFile(args[1])
			if err != nil {
				return err
			}
			m, release, err := f.use(cmd.Context(), a, args[0])
			if err != nil {
				return err
			}
			tokens, err := m.Tokens.Encode(text, false)
			var r model.Perplexity
			if err == nil {
				r, err = m.Weights.Perplexity(cmd.Context(), model.PerplexityOptions{Tokens: tokens, BOS: m.Tokens.BOS(), Chunk: chunk, Limit: limit,
					Numbers: m.Engine.CacheType(), Sparse: m.Engine.Sparse()})
			}
			if err := errors.Join(err, release()); err != nil {
				return err
			}
			if done, err := out.structured(a.stdout, r); done {
				return err
			}
			fmt.Fprintf(a.stdout, "perplexity %.4f over %d tokens in %d chunks\n", r.Value, r.Tokens, r.Chunks)
			return nil
		},
	}
	f.add(cmd)
	out.flags(cmd, "")
	cmd.Flags().IntVar(&chunk, "chunk", 512, "`tokens` of a chunk")
	cmd.Flags().IntVar(&limit, "limit", 0, "`chunks` at most; default all")
	return cmd
}
