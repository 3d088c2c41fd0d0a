package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// figure is the distribution of one measurement.
type figure struct {
	P50 float64 `json:"p50_ms"`
	P95 float64 `json:"p95_ms"`
	N   int     `json:"n"`
}

// benchReport is what `atoll bench sandbox -o json` prints. A measurement that
// the runtime cannot have is left out.
type benchReport struct {
	Runtime  string  `json:"runtime"`
	Image    string  `json:"image"`
	Through  string  `json:"through"` // "daemon" or "in-process"
	Cold     *figure `json:"cold,omitempty"`
	Template *figure `json:"template,omitempty"`
	Spawned  *figure `json:"spawned,omitempty"`
	Ready    *figure `json:"ready,omitempty"`
	Snapshot *figure `json:"snapshot,omitempty"`
	Pool     *figure `json:"pool,omitempty"`
	Exec     *figure `json:"exec,omitempty"`
	Fork10   *figure `json:"fork10,omitempty"`
	IdleMB   float64 `json:"idle_mb,omitempty"` // of one idle sandbox, in 10^6 bytes
}

// figureOf computes percentiles by nearest rank.
func figureOf(times []time.Duration) *figure {
	if len(times) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(times))
	rank := func(p float64) float64 {
		i := int(math.Ceil(p*float64(len(sorted)))) - 1
		return math.Round(float64(sorted[max(0, i)].Microseconds())/10) / 100
	}
	return &figure{P50: rank(0.50), P95: rank(0.95), N: len(times)}
}

// throughDaemon says that a running daemon was measured.
const throughDaemon = "daemon"

const (
	maxBench    = 10_000
	idleCount   = 10              // idle sandboxes whose memory is averaged
	idleSettle  = 2 * time.Second // until a new sandbox is idle
	poolSize    = 4
	poolPatient = 2 * time.Minute // until a pool is filled
)

func (a *app) benchCommand() *cobra.Command {
	var f format
	var runtime, img string
	var n int
	sandboxes := &cobra.Command{
		Use: "sandbox", Short: "Measure creating, restoring, forking and entering sandboxes", Args: exact(),
		Long: "Times are from asking for a sandbox to the first output of `echo` in it; exec is the same in a sandbox that\n" +
			"runs; fork10 is from asking for ten children to all ten being there. cold starts from the image, snapshot\n" +
			"restores one, pool claims a started sandbox. For microvm, cold boots a kernel, template clones a booted machine,\n" +
			"spawned does so into a monitor that was started ahead of need, and ready takes a machine that was. idle_mb is what one idle sandbox takes of the host's memory.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if n < 1 || n > maxBench {
				return usageError("", "", "-n must be from 1 to %d", maxBench)
			}
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			report, err := a.benchSandbox(cmd.Context(), b, runtime, img, n)
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, report); done {
				return err
			}
			return printBench(a.stdout, report)
		},
	}
	f.flags(sandboxes, "")
	sandboxes.Flags().StringVar(&runtime, "runtime", "", "the `runtime`; default: the node's")
	sandboxes.Flags().StringVar(&img, "image", "", "the `image`; default: base, or a small repository for worktree")
	sandboxes.Flags().IntVarP(&n, "count", "n", 30, "how many `times` to measure")
	return group("bench", "Measure this node", sandboxes, a.benchDeltaCommand(), a.benchModelCommand(), a.benchAttentionCommand(), a.benchQuantizeCommand())
}

func printBench(w io.Writer, r benchReport) error {
	fmt.Fprintf(w, "%s, image %s, %s\n\n", r.Runtime, r.Image, r.Through)
	t := newTable(w)
	t.row("MEASURED", "P50", "P95", "N")
	for _, m := range []struct {
		name string
		f    *figure
	}{
		{"create, cold, to first output", r.Cold}, {"clone the template, to first output", r.Template},
		{"clone into a spawned monitor, to first output", r.Spawned}, {"take a ready machine, to first output", r.Ready}, {"restore a snapshot, to first output", r.Snapshot},
		{"claim from the pool, to first output", r.Pool}, {"exec, to first output", r.Exec}, {"fork ten ways", r.Fork10},
	} {
		if m.f != nil {
			t.row(m.name, fmt.Sprintf("%.1f ms", m.f.P50), fmt.Sprintf("%.1f ms", m.f.P95), fmt.Sprint(m.f.N))
		}
	}
	if r.IdleMB > 0 {
		t.row("memory of an idle sandbox", fmt.Sprintf("%.1f MB", r.IdleMB), "", "")
	}
	return t.flush()
}

// bench is one run of the benchmark.
type bench struct {
	b    native.Backend
	req  node.CreateRequest
	n    int
	live map[string]bool // sandboxes to remove at the end
}

func (a *app) benchSandbox(ctx context.Context, b native.Backend, runtime, img string, n int) (r benchReport, err error) {
	caps, err := capabilitiesOf(ctx, b, &runtime)
	if err != nil {
		return r, err
	}
	if img == "" {
		img = image.BaseName
		if slices.Contains(caps.Roots, sandbox.RootRepository) {
			dir, err := benchRepository(ctx)
			if err != nil {
				return r, err
			}
			defer os.RemoveAll(dir)
			img = dir
		}
	}
	if err := a.fetch(ctx, b, img, "missing"); err != nil {
		return r, err
	}
	m := &bench{b: b, n: n, live: map[string]bool{}, req: node.CreateRequest{Image: img, Runtimes: []string{runtime}}}
	defer func() { err = errors.Join(err, m.clear(ctx)) }()
	r = benchReport{Runtime: runtime, Image: img, Through: "in-process"}
	if a.daemonURL != "" {
		r.Through = throughDaemon
	}
	for _, step := range []struct {
		name string
		do   func(context.Context, sandbox.Capabilities, *benchReport) error
	}{
		{"cold", m.cold}, {"template", m.template}, {"spawned", m.spawned}, {"ready", m.ready}, {"exec", m.exec}, {"idle", m.idle}, {"snapshot", m.restore}, {"fork10", m.fork}, {"pool", m.pool},
	} {
		shown := a.bar("measuring")
		shown.report(image.Progress{Stage: step.name})
		err := step.do(ctx, caps, &r)
		shown.done()
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// capabilitiesOf looks up what a runtime can do, and fills in the default one.
func capabilitiesOf(ctx context.Context, b native.Backend, name *string) (sandbox.Capabilities, error) {
	all, err := b.Runtimes(ctx)
	if err != nil {
		return sandbox.Capabilities{}, err
	}
	for _, r := range all {
		if r.Name != *name && (*name != "" || !r.Default) {
			continue
		}
		if r.Err != "" {
			return sandbox.Capabilities{}, sandbox.Errorf("atoll bench", sandbox.Unsupported, r.Name, "this host cannot run it: %s", r.Err).WithHint("`atoll doctor` says what to do")
		}
		*name = r.Name
		return r.Capabilities, nil
	}
	return sandbox.Capabilities{}, sandbox.Errorf("atoll bench", sandbox.NotFound, *name, "no such runtime").WithHint("`atoll runtime ls` shows them")
}

// benchRepository makes a git repository of a hundred files.
func benchRepository(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "atoll-bench-")
	if err != nil {
		return "", err
	}
	for i := range 100 {
		if err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("file%02d.txt", i)), []byte(strings.Repeat("line\n", 100)), 0o644); err != nil {
			return dir, err
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"-c", "user.name=atoll", "-c", "user.email=atoll@localhost", "commit", "-q", "-m", "bench"}} {
		git := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
		if out, err := git.CombinedOutput(); err != nil {
			return dir, errors.Join(sandbox.Errorf("atoll bench", sandbox.Unavailable, "git", "%v: %s", err, out), os.RemoveAll(dir))
		}
	}
	return dir, nil
}
