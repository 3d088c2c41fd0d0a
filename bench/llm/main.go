// Command llm measures our kernels against the memory of this machine, and our engine against llama.cpp on the same weights
// and threads, turn by turn. Weights are random, in the shape of TinyLlama-1.1B with SmolLM2's vocabulary: speed does not
// depend on what they say. It asserts nothing: a measurement is no test.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/internal/machine"
)

// An engine runs one model.
type engine interface {
	// prefill reads n tokens of a new text, decode writes n more; both return the seconds it took.
	prefill(n int) (float64, error)
	decode(n int) (float64, error)
	close() error
}

// A line is one row of the table: medians of tokens a second.
type line struct {
	weights, engine string
	threads         int
	prefill, decode float64
	bytes           int64 // of weights that a token reads
}

type options struct {
	types           []string
	threads         []int
	rounds, layers  int
	prompt, answer  int
	table, packages string
}

func main() {
	var o options
	types := flag.String("types", "Q4_0,Q8_0,Q4_K_M,F16,BF16", "kinds of `weights`")
	threads := flag.String("threads", "1,2", "`numbers` of threads")
	flag.IntVar(&o.rounds, "rounds", 3, "how many `times` each is measured")
	flag.IntVar(&o.layers, "layers", 22, "how many `layers` the model has")
	flag.IntVar(&o.prompt, "prompt", 512, "`tokens` of the prompt")
	flag.IntVar(&o.answer, "answer", 24, "`tokens` of the answer")
	flag.StringVar(&o.table, "table", "docs/performance-llm.md", "where the table goes")
	flag.StringVar(&o.packages, "packages", "build/llama.cpp", "`folder` for llama.cpp's build from npm")
	flag.Parse()
	o.types = strings.Split(*types, ",")
	for _, n := range strings.Split(*threads, ",") {
		i, err := strconv.Atoi(n)
		if err != nil || i < 1 {
			fmt.Fprintln(os.Stderr, "bench/llm: -threads must be numbers")
			os.Exit(2)
		}
		o.threads = append(o.threads, i)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := measure(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/llm:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "atoll-bench-llm")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	llama, absent := findLlama(ctx, o.packages)
	var lines []line
	sweeps, err := sweep(o.threads, o.rounds)
	if err != nil {
		return err
	}
	for _, weights := range o.types {
		file := filepath.Join(dir, weights+".gguf")
		bytes, err := write(ctx, file, weights, o.layers)
		if err != nil {
			return err
		}
		for _, n := range o.threads {
			more, err := compare(ctx, o, file, weights, n, llama)
			if err != nil {
				return err
			}
			for i := range more {
				more[i].bytes = bytes
				fmt.Printf("%+v\n", more[i])
			}
			lines = append(lines, more...)
		}
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	return os.WriteFile(o.table, []byte(report(o, lines, sweeps, llama, absent)), 0o644)
}

// compare measures all engines on one file, turn by turn.
func compare(ctx context.Context, o options, file, weights string, threads int, llama *llamaCPP) (lines []line, err error) {
	starts := []struct {
		name string
		open func() (engine, error)
	}{
		{"atoll", func() (engine, error) { return openOurs(ctx, file, threads, o.prompt+o.answer*(o.rounds+1)) }},
		{"llama.cpp", func() (engine, error) { return llama.open(ctx, file, threads, o, false) }},
		{"llama.cpp, huge pages", func() (engine, error) { return llama.open(ctx, file, threads, o, true) }},
	}
	if llama == nil {
		starts = starts[:1]
	}
	var engines []engine
	defer func() {
		for _, e := range engines {
			err = errors.Join(err, e.close())
		}
	}()
	for _, s := range starts {
		e, err := s.open()
		if err != nil {
			return nil, fmt.Errorf("%s with %s: %w", s.name, weights, err)
		}
		engines = append(engines, e)
	}
	prefills, decodes := make([][]float64, len(engines)), make([][]float64, len(engines))
	for round := range o.rounds + 1 {
		for i, e := range engines {
			p, err := e.prefill(o.prompt)
			if err != nil {
				return nil, err
			}
			d, err := e.decode(o.answer)
			if err != nil {
				return nil, err
			}
			if round > 0 { // the first warms up
				prefills[i], decodes[i] = append(prefills[i], float64(o.prompt)/p), append(decodes[i], float64(o.answer)/d)
			}
		}
	}
	for i, s := range starts {
		lines = append(lines, line{weights: weights, engine: s.name, threads: threads, prefill: median(prefills[i]), decode: median(decodes[i])})
	}
	return lines, nil
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}

// report is the table in Markdown.
func report(o options, lines []line, sweeps map[int]float64, llama *llamaCPP, absent error) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Language models on the CPU, beside llama.cpp\n\n%s, %s. Written by `make bench-llm`.\n\n", time.Now().UTC().Format(time.DateOnly), machine.Describe())
	fmt.Fprintf(&b, "Random weights in the shape of TinyLlama-1.1B (%d layers of 2048, 32 heads on 4, FFN 5632, vocabulary 49152). Medians of %d turns, "+
		"taken in turn with the others; tokens a second. Prefill: %d tokens; decode: %d more, one by one. The limit is how fast memory on huge pages can be "+
		"read, in the same run: ", o.layers, o.rounds, o.prompt, o.answer)
	for _, n := range o.threads {
		fmt.Fprintf(&b, "%.1f GB/s with %d thread(s); ", sweeps[n]/1e9, n)
	}
	switch {
	case llama != nil:
		fmt.Fprintf(&b, "llama.cpp is the prebuilt one of %s (%s); with huge pages means without mmap and with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.\n\n", llama.name(), llama.release)
	default:
		fmt.Fprintf(&b, "llama.cpp was not measured: %v.\n\n", absent)
	}
	b.WriteString("| weights | threads | engine | prefill | decode | decode: of the limit | ours / it: prefill | decode |\n|---|---|---|---|---|---|---|---|\n")
	var ours line
	for _, l := range lines {
		if l.engine == "atoll" {
			ours = l
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %.1f | %.1f | %.0f %% | %.2f | %.2f |\n", l.weights, l.threads, l.engine, l.prefill, l.decode,
			100*l.decode*float64(l.bytes)/sweeps[l.threads], ours.prefill/l.prefill, ours.decode/l.decode)
	}
	return b.String()
}
