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
	"github.com/atoll-run/atoll/guest"
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
			"restores one, pool claims a started sandbox. idle_mb is what one idle sandbox takes of the host's memory.",
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
	return group("bench", "Measure this node", sandboxes)
}

func printBench(w io.Writer, r benchReport) error {
	fmt.Fprintf(w, "%s, image %s, %s\n\n", r.Runtime, r.Image, r.Through)
	t := newTable(w)
	t.row("MEASURED", "P50", "P95", "N")
	for _, m := range []struct {
		name string
		f    *figure
	}{
		{"create, cold, to first output", r.Cold}, {"restore a snapshot, to first output", r.Snapshot},
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
		r.Through = "daemon"
	}
	for _, step := range []struct {
		name string
		do   func(context.Context, sandbox.Capabilities, *benchReport) error
	}{
		{"cold", m.cold}, {"exec", m.exec}, {"idle", m.idle}, {"snapshot", m.restore}, {"fork10", m.fork}, {"pool", m.pool},
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

// firstOutput runs echo in a sandbox and returns when its output is here.
func (m *bench) firstOutput(ctx context.Context, sb node.Sandbox) error {
	g := guestOf(m.b, sb)
	defer g.CloseIdle()
	p, err := g.Start(ctx, guest.Command{Args: []string{"echo", "ready"}})
	if err != nil {
		return err
	}
	defer p.Close()
	for {
		e, err := p.Next()
		if err != nil {
			return err
		}
		switch e.Kind {
		case guest.Stdout:
			return nil
		case guest.End:
			return sandbox.Errorf("atoll bench", sandbox.Internal, sb.Name, "echo ended without output: %s", e.Result.Status)
		}
	}
}

// times measures n times from making a sandbox to its first output; removing
// it is not measured. between, which may be nil, comes before each.
func (m *bench) times(ctx context.Context, between func() error, create func() (node.Sandbox, error)) (*figure, error) {
	var times []time.Duration
	for range m.n {
		if between != nil {
			if err := between(); err != nil {
				return nil, err
			}
		}
		begin := time.Now()
		sb, err := create()
		if err != nil {
			return nil, err
		}
		m.live[sb.ID] = true
		if err := m.firstOutput(ctx, sb); err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin))
		if err := m.remove(ctx, sb.ID); err != nil {
			return nil, err
		}
	}
	return figureOf(times), nil
}

func (m *bench) create(ctx context.Context) (node.Sandbox, error) {
	req := m.req
	req.Fresh = true
	sb, err := m.b.Create(ctx, req)
	if err == nil {
		m.live[sb.ID] = true
	}
	return sb, err
}

func (m *bench) remove(ctx context.Context, id string) error {
	err := m.b.Remove(ctx, id)
	if err == nil || sandbox.Is(err, sandbox.NotFound) {
		delete(m.live, id)
		return nil
	}
	return err
}

// clear removes what is left, also after a failure or ctrl-c.
func (m *bench) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	var errs []error
	for id := range m.live {
		errs = append(errs, m.remove(ctx, id))
	}
	return errors.Join(errs...)
}

func (m *bench) cold(ctx context.Context, _ sandbox.Capabilities, r *benchReport) (err error) {
	r.Cold, err = m.times(ctx, nil, func() (node.Sandbox, error) { return m.create(ctx) })
	return err
}

func (m *bench) exec(ctx context.Context, _ sandbox.Capabilities, r *benchReport) error {
	sb, err := m.create(ctx)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range m.n {
		begin := time.Now()
		if err := m.firstOutput(ctx, sb); err != nil {
			return err
		}
		times = append(times, time.Since(begin))
	}
	r.Exec = figureOf(times)
	return m.remove(ctx, sb.ID)
}

func (m *bench) idle(ctx context.Context, _ sandbox.Capabilities, r *benchReport) error {
	var ids []string
	for range idleCount {
		sb, err := m.create(ctx)
		if err != nil {
			return err
		}
		ids = append(ids, sb.ID)
	}
	select {
	case <-time.After(idleSettle):
	case <-ctx.Done():
		return ctx.Err()
	}
	var total int64
	for _, id := range ids {
		s, err := m.b.Stats(ctx, id)
		if err != nil {
			return err
		}
		total += s.Memory
		if err := m.remove(ctx, id); err != nil {
			return err
		}
	}
	r.IdleMB = math.Round(float64(total)/idleCount/1e5) / 10
	return nil
}

func (m *bench) restore(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	if !caps.Snapshot {
		return nil
	}
	sb, err := m.create(ctx)
	if err != nil {
		return err
	}
	snap, err := m.b.Snapshot(ctx, sb.ID, "")
	if err != nil {
		return err
	}
	if err := m.remove(ctx, sb.ID); err != nil {
		return err
	}
	r.Snapshot, err = m.times(ctx, nil, func() (node.Sandbox, error) { return m.b.Restore(ctx, snap.ID, node.CreateRequest{}) })
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	return errors.Join(err, m.b.RemoveSnapshot(end, snap.ID))
}

func (m *bench) fork(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	if !caps.Snapshot {
		return nil
	}
	parent, err := m.create(ctx)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range max(3, m.n/5) { // each makes ten sandboxes
		begin := time.Now()
		children, err := m.b.Fork(ctx, parent.ID, 10, node.CreateRequest{})
		if err != nil {
			return err
		}
		times = append(times, time.Since(begin))
		for _, c := range children {
			if c.Err != nil {
				return c.Err
			}
			m.live[c.Sandbox.ID] = true
		}
		for _, c := range children {
			if err := m.remove(ctx, c.Sandbox.ID); err != nil {
				return err
			}
		}
	}
	r.Fork10 = figureOf(times)
	return m.remove(ctx, parent.ID)
}

// pool measures claims from a warm pool, which only a template can have. A pool
// that was there before gets its size back.
func (m *bench) pool(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	t, err := m.b.GetTemplate(ctx, m.req.Image)
	if err != nil || !caps.Snapshot {
		return nil
	}
	pools, err := m.b.Pools(ctx)
	if err != nil {
		return err
	}
	before := 0
	ready := func(pools []node.Pool) int {
		for _, p := range pools {
			if p.Template == t.ID {
				return p.Ready
			}
		}
		return 0
	}
	for _, p := range pools {
		if p.Template == t.ID {
			before = p.Size
		}
	}
	if err := m.b.SetPool(ctx, t.ID, max(poolSize, before)); err != nil {
		return err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
		defer cancel()
		_ = m.b.SetPool(end, t.ID, before) // the measurements are what matters
	}()
	full := func() error { // a pool being refilled would be measured along
		deadline := time.Now().Add(poolPatient)
		for {
			pools, err := m.b.Pools(ctx)
			if err != nil {
				return err
			}
			if ready(pools) >= max(poolSize, before) {
				return nil
			}
			if time.Now().After(deadline) {
				return sandbox.Errorf("atoll bench", sandbox.Timeout, t.ID, "the pool is not filled after %s", poolPatient)
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	r.Pool, err = m.times(ctx, full, func() (node.Sandbox, error) { return m.b.Create(ctx, m.req) })
	return err
}
