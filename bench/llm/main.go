// Command llm measures our engine against llama.cpp on the same weights and threads, turn by turn, and both against the
// memory of this machine; what other work on the machine does to them; and how soon an answer begins. It asserts nothing: a
// measurement is no test.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A bench is one run.
type bench struct {
	types           []string
	threads         []int
	rounds, layers  int
	prompt, answer  int
	budget          time.Duration // for the turns of one cell
	total           time.Duration // for all cells; when that is not kept, the rest get one turn each
	loaded          []string      // what is measured beside other work
	startsOn        string        // whose first token is measured
	table, packages string

	mem    memory
	llama  *llamaCPP // nil if it cannot be had
	absent error     // why
	began  time.Time
	cells  []cell
	firsts []start
}

const smol = "SmolLM2-135M Q4_1"

func main() {
	var b bench
	types := flag.String("types", "Q4_0,Q8_0,Q4_K_M,F16,BF16", "kinds of `weights`, or none")
	threads := flag.String("threads", "1,2", "`numbers` of threads")
	flag.IntVar(&b.rounds, "rounds", 6, "how many `times` each is measured at most")
	flag.IntVar(&b.layers, "layers", 22, "how many `layers` the model has")
	flag.IntVar(&b.prompt, "prompt", 512, "`tokens` of the prompt")
	flag.IntVar(&b.answer, "answer", 16, "`tokens` of the answer")
	flag.DurationVar(&b.budget, "budget", 25*time.Second, "`time` for the turns of one model with one number of threads; at least two turns are taken")
	flag.DurationVar(&b.total, "total", 10*time.Minute, "`time` for all; where more has passed than a cell's part of it, one turn is taken")
	flag.StringVar(&b.startsOn, "first", "Q4_0", "the `type` whose first token is measured")
	flag.StringVar(&b.table, "table", "docs/performance-llm.md", "where the table goes")
	flag.StringVar(&b.packages, "packages", "build/llama.cpp", "`folder` for llama.cpp's build from npm")
	spin := flag.Bool("spin", false, "compute on every CPU without end, for others to compete with")
	flag.Parse()
	if *spin {
		spinOn()
	}
	b.types = slices.DeleteFunc(strings.Split(*types, ","), func(s string) bool { return s == "" || s == "none" })
	b.loaded = []string{"Q4_0", smol}
	for _, n := range strings.Split(*threads, ",") {
		i, err := strconv.Atoi(n)
		if err != nil || i < 1 {
			fmt.Fprintln(os.Stderr, "bench/llm: -threads must be numbers")
			os.Exit(2)
		}
		b.threads = append(b.threads, i)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench/llm:", err)
		os.Exit(1)
	}
}

func (b *bench) allThreads() int { return slices.Max(b.threads) }

// spinOn keeps all CPUs busy until the process is ended, or whoever started it is gone.
func spinOn() {
	parent := os.Getppid()
	for range runtime.NumCPU() {
		go func() {
			for i := 0; ; i++ {
				if i&(1<<30-1) == 0 && os.Getppid() != parent {
					os.Exit(0)
				}
			}
		}()
	}
	select {}
}

func (b *bench) run(ctx context.Context) (err error) {
	b.began = time.Now()
	dir, err := os.MkdirTemp("", "atoll-bench-llm")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b.llama, b.absent = findLlama(ctx, b.packages)
	if b.mem, err = newMemory(); err != nil {
		return err
	}
	real, bytes, err := smolLM2(ctx)
	if err != nil {
		return err
	}
	if err := b.measure(ctx, subject{smol, real, bytes}); err != nil {
		return err
	}
	for _, weights := range b.types {
		if err := b.one(ctx, dir, weights); err != nil {
			return err
		}
	}
	return os.WriteFile(b.table, []byte(b.report(time.Since(b.began))), 0o644)
}

// one measures a kind of weights.
func (b *bench) one(ctx context.Context, dir, weights string) error {
	file := filepath.Join(dir, weights+".gguf")
	bytes, err := write(ctx, file, weights, b.layers)
	if err != nil {
		return err
	}
	if err := b.measure(ctx, subject{weights, file, bytes}); err != nil {
		return err
	}
	if weights == b.startsOn {
		if b.firsts, err = b.starts(ctx, file); err != nil {
			return err
		}
	}
	return os.Remove(file)
}
