package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/openai"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/daemon"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/engine"
	llmhost "github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

func (a *app) modelCommand() *cobra.Command {
	return group("model", "Import, measure and serve language models", a.modelImportCommand(), a.modelListCommand(), a.modelRemoveCommand(),
		a.modelChatCommand(), a.modelServeCommand(), a.modelQuantizeCommand(), a.modelPerplexityCommand(),
		a.carryCommand("push", carry.Model, "Copy a model to another node, as little of it as need be", false, modelNames),
		a.carryCommand("pull", carry.Model, "Copy a model from another node, as little of it as need be", true, modelNames))
}

func (a *app) modelStore() *llmhost.Store { return llmhost.OpenStore(daemon.Home(a.home).Models()) }

// modelNames completes models.
func modelNames(_ context.Context, a *app) []string {
	all, _ := a.modelStore().List()
	names := make([]string, len(all))
	for i, m := range all {
		names[i] = m.Name
	}
	return names
}

// modelFlags are the settings of a model in use.
type modelFlags struct {
	threads int
	window  int
	memory  size
	cache   size
	guess   int
	kv      string
	draft   string
	attend  string
	rope    string
}

func (f *modelFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.IntVarP(&f.threads, "threads", "t", 0, "`threads` that compute; default all CPUs")
	fl.IntVar(&f.window, "window", 0, "`tokens` of a conversation; default the model's, up to 8192")
	fl.Var(&f.memory, "memory", "`bytes` for all models together; default four fifths of the machine's")
	fl.Var(&f.cache, "cache", "`bytes` for keys and values; default what one window needs")
	fl.IntVar(&f.guess, "guess", 0, "`tokens` to guess ahead from what is in the text already, or with --draft")
	fl.StringVar(&f.draft, "draft", "", "a small `model` of the same tokens that guesses ahead; answers stay as likely as they are")
	fl.StringVar(&f.kv, "kv", "f16", "how keys and values are kept: `f16`, bf16, int8 or int4")
	fl.StringVar(&f.attend, "attention", "full", "what tokens attend to: `full`, window[:TOKENS] or sparse[:PAGES]")
	f.addRope(cmd)
}

func (f *modelFlags) addRope(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.rope, "rope", "", "read texts longer than the model was made for: `linear:FACTOR` or yarn:FACTOR")
}

func (f *modelFlags) host(a *app) (llmhost.Config, error) {
	numbers, err := tensor.ParseKV(f.kv)
	if err != nil {
		return llmhost.Config{}, usageError(f.kv, "use f16, bf16, int8 or int4", "--kv: %v", err)
	}
	sparse, err := engine.ParseAttention(f.attend)
	if err != nil {
		return llmhost.Config{}, err
	}
	stretch, err := model.ParseStretch(f.rope)
	if err != nil {
		return llmhost.Config{}, err
	}
	c := llmhost.Config{Stretch: stretch, Store: a.modelStore(), Threads: f.threads, Memory: int64(f.memory), Draft: f.draft,
		Engine: engine.Config{Window: f.window, CacheBytes: int64(f.cache), CacheType: numbers, Guess: f.guess, Sparse: sparse}}
	return c, nil
}

// use loads one model for a command. release gives everything back.
func (f *modelFlags) use(ctx context.Context, a *app, ref string) (m *llmhost.Model, release func() error, err error) {
	c, err := f.host(a)
	if err != nil {
		return nil, nil, err
	}
	h, err := llmhost.New(c)
	if err != nil {
		return nil, nil, err
	}
	m, done, err := h.Use(ctx, ref)
	if err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return m, func() error { done(); return h.Close() }, nil
}

func (a *app) modelImportCommand() *cobra.Command {
	var f format
	var name string
	cmd := &cobra.Command{
		Use: "import FILE|FOLDER|URL", Short: "Keep a copy of a model to serve", Args: exact("FILE|FOLDER|URL"),
		Long: "Import takes a GGUF file, from a disk or an HTTP address, or a folder in Hugging Face's layout: config.json,\n" +
			"tokenizer.json and safetensors.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			shown := a.bar("importing")
			info, err := a.modelStore().Import(cmd.Context(), args[0], name, func(done, all int64) {
				shown.report(image.Progress{Stage: "copying", Done: done, Total: max(all, 0)})
			})
			shown.done()
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, info); done {
				return err
			}
			fmt.Fprintln(a.stdout, info.Name)
			return nil
		},
	}
	f.flags(cmd, "print the name only")
	cmd.Flags().StringVar(&name, "name", "", "what to call it; default: as its file")
	return cmd
}

func (a *app) modelListCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List models", Args: exact(),
		RunE: func(*cobra.Command, []string) error {
			if err := f.check(); err != nil {
				return err
			}
			all, err := a.modelStore().List()
			if err != nil {
				return err
			}
			return list(a.stdout, &f, all, func(i llmhost.Info) string { return i.Name }, []column[llmhost.Info]{
				{head: "NAME", cell: func(i llmhost.Info) string { return i.Name }},
				{head: "FAMILY", cell: func(i llmhost.Info) string { return i.Family }},
				{head: "PARAMETERS", cell: func(i llmhost.Info) string { return fmt.Sprintf("%.2fB", float64(i.Parameters)/1e9) }},
				{head: "TYPE", cell: func(i llmhost.Info) string { return i.Type }},
				{head: "SIZE", cell: func(i llmhost.Info) string { return formatBytes(i.Bytes) }},
				{head: "WINDOW", cell: func(i llmhost.Info) string { return fmt.Sprint(i.Context) }},
				{head: "DIGEST", wide: true, cell: func(i llmhost.Info) string { return i.Digest }},
				{head: "ORIGIN", wide: true, cell: func(i llmhost.Info) string { return i.Origin }},
			})
		},
	}
	f.flags(cmd, "print names only")
	return cmd
}

func (a *app) modelRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm NAME...", Short: "Remove models", Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var errs []error
			for _, name := range args {
				errs = append(errs, a.modelStore().Remove(name))
			}
			return errors.Join(errs...)
		},
	}
	a.completes(cmd, -1, modelNames)
	return cmd
}

// defaultModelAddr is where `atoll model serve` listens.
const defaultModelAddr = "127.0.0.1:7701"

func (a *app) modelServeCommand() *cobra.Command {
	var f modelFlags
	var listen, key string
	cmd := &cobra.Command{
		Use: "serve [FILE|URL]...", Short: "Serve models by OpenAI's API, without a node",
		Long: "Serve answers /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/models for all imported models, which are\n" +
			"loaded when they are asked for, and for the files and addresses that are named, which are loaded at once. An\n" +
			"answer may begin before all weights have arrived. `atoll up` serves imported models as well.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.host(a)
			if err != nil {
				return err
			}
			c.Log, c.Keep, c.Also = a.daemonLog(false), filepath.Join(daemon.Home(a.home).Models(), ".cache"), map[string]string{}
			for _, ref := range args {
				c.Also[llmhost.NameOf(ref)] = ref
			}
			h, err := llmhost.New(c)
			if err != nil {
				return err
			}
			err = a.serveModels(cmd.Context(), h, c, listen, key)
			return errors.Join(err, h.Close())
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&listen, "listen", defaultModelAddr, "the `address` to serve")
	cmd.Flags().StringVar(&key, "key", os.Getenv("ATOLL_MODEL_KEY"), "the `key` that clients must show; default none ($ATOLL_MODEL_KEY)")
	return cmd
}

func (a *app) serveModels(ctx context.Context, h *llmhost.Host, c llmhost.Config, listen, key string) error {
	const op = "atoll model serve"
	answers, err := cache.OpenAnswers(filepath.Join(c.Keep, "answers"), 64<<20)
	if err != nil {
		return err
	}
	oc := openai.Config{Host: h, Answers: answers, Log: c.Log}
	if oc.Upstreams, err = daemon.Home(a.home).Upstreams(); err != nil {
		return err
	}
	if key != "" {
		oc.Verify = func(_ context.Context, secret string) (string, error) {
			if secret != key {
				return "", sandbox.Errorf(op, sandbox.Denied, "", "the key is not known here")
			}
			return "", nil
		}
	}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return sandbox.E(op, sandbox.Conflict, listen, err).WithHint("choose another address with --listen")
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(openai.NewCollector(h, answers))
	mux := http.NewServeMux()
	mux.Handle("/v1/", openai.New(oc))
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 10 * time.Minute,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	for name := range c.Also { // before anybody asks
		go func() {
			if _, release, err := h.Use(ctx, name); err != nil {
				c.Log.Error("loading a model", "model", name, "error", err)
			} else {
				release()
			}
		}()
	}
	fmt.Fprintf(a.stdout, "http://%s/v1\n", ln.Addr())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return sandbox.E(op, sandbox.Internal, listen, err)
	}
	return nil
}

// textFile reads a file of text, - being standard input.
func (a *app) textFile(name string) (string, error) {
	const limit = 64 << 20
	in := a.stdin
	if name != "-" {
		f, err := os.Open(filepath.Clean(name))
		if err != nil {
			return "", usageError(name, "name a file of text, or - for standard input", "cannot read the text: %v", err)
		}
		defer f.Close()
		in = f
	}
	var b strings.Builder
	if n, err := copyUpTo(&b, in, limit); err != nil {
		return "", err
	} else if n > limit {
		return "", usageError(name, "", "more than %s of text", formatBytes(limit))
	}
	return b.String(), nil
}
