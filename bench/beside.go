package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// said is what every measured command prints.
const said = "ready"

// A subject is one way to run a command in isolation.
type subject struct {
	name string
	run  func(ctx context.Context) (time.Duration, error) // from the start to the first output
}

// A series is what one subject took.
type series struct {
	Name string  `json:"name"`
	N    int     `json:"n"`
	P50  float64 `json:"p50_ms"`
	P95  float64 `json:"p95_ms"`
}

func names(subjects []subject) string {
	var all []string
	for _, s := range subjects {
		all = append(all, s.name)
	}
	return strings.Join(all, ", ")
}

// interleave runs all subjects in turn, n times, so that what disturbs the
// machine disturbs them alike. One unmeasured round goes before.
func interleave(ctx context.Context, subjects []subject, n int) ([]series, error) {
	took := make([][]time.Duration, len(subjects))
	for round := -1; round < n; round++ {
		for i, s := range subjects {
			d, err := s.run(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			if round >= 0 {
				took[i] = append(took[i], d)
			}
		}
	}
	var all []series
	for i, s := range subjects {
		all = append(all, series{Name: s.name, N: n, P50: quantile(took[i], 0.50), P95: quantile(took[i], 0.95)})
	}
	return all, nil
}

// quantile returns the value in milliseconds that a fraction q of the samples do
// not exceed (nearest rank); samples has at least one.
func quantile(samples []time.Duration, q float64) float64 {
	sorted := slices.Sorted(slices.Values(samples))
	rank := int(math.Ceil(q*float64(len(sorted)) - 1e-9)) // 0.95 of 20 is 19, whatever its last bit says
	return float64(sorted[max(rank, 1)-1]) / float64(time.Millisecond)
}

// subjects returns what can be measured here, and says what cannot. close ends
// what serves them.
func subjects(ctx context.Context, n *node, root, dir string) (found []subject, absent []string, closeAll func()) {
	found = append(found,
		subject{name: "atoll run", run: commandLine(n.env, n.binary, "run", "--rm", "base", "--", "echo", said)},
		subject{name: "atoll run --fresh", run: commandLine(n.env, n.binary, "run", "--rm", "--fresh", "base", "--", "echo", said)})
	if bwrap, err := exec.LookPath("bwrap"); err == nil {
		found = append(found, subject{name: "bubblewrap", run: commandLine(nil, bwrap, "--ro-bind", root, "/", "--proc", "/proc", "--dev", "/dev",
			"--tmpfs", "/tmp", "--unshare-all", "--die-with-parent", "echo", said)})
	} else {
		absent = append(absent, "bubblewrap is not installed")
	}
	if run, err := runc(ctx, root, dir); err == nil {
		found = append(found, subject{name: "runc run", run: run})
	} else {
		absent = append(absent, "runc: "+firstLine(err.Error()))
	}
	closeAll = func() {}
	const name = "E2B SDK: create and first command"
	if run, end, err := sdk(ctx, n, ""); err == nil {
		found, closeAll = append(found, subject{name: name, run: run}), end
	} else {
		absent = append(absent, name+": "+firstLine(err.Error()))
	}
	return found, absent, closeAll
}

// commandLine measures a command from its start to the first byte that it prints.
func commandLine(env []string, name string, args ...string) func(context.Context) (time.Duration, error) {
	return func(ctx context.Context) (time.Duration, error) {
		cmd := exec.CommandContext(ctx, name, args...)
		var errors strings.Builder
		cmd.Env, cmd.Stderr = env, &errors
		out, err := cmd.StdoutPipe()
		if err != nil {
			return 0, err
		}
		from := time.Now()
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		var first [1]byte
		_, readErr := io.ReadFull(out, first[:])
		took := time.Since(from)
		rest, _ := io.ReadAll(out)
		if err := cmd.Wait(); err != nil {
			return 0, fmt.Errorf("%w: %s", err, errors.String())
		}
		if got := strings.TrimSpace(string(first[:]) + string(rest)); readErr != nil || got != said {
			return 0, fmt.Errorf("printed %q, not %q", got, said)
		}
		return took, nil
	}
}

// runc prepares a bundle over root and measures a container of it.
func runc(ctx context.Context, root, dir string) (func(context.Context) (time.Duration, error), error) {
	bundle := filepath.Join(dir, "bundle")
	if err := os.Mkdir(bundle, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "runc", "spec", "--bundle", bundle).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("runc spec: %w: %s", err, out)
	}
	file := filepath.Join(bundle, "config.json")
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var spec map[string]any
	if err := json.Unmarshal(text, &spec); err != nil {
		return nil, err
	}
	spec["root"] = map[string]any{"path": root, "readonly": true}
	process, ok := spec["process"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("%s has no process", file)
	}
	process["terminal"], process["args"] = false, []string{"echo", said}
	if text, err = json.Marshal(spec); err != nil {
		return nil, err
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	count := 0
	run := func(ctx context.Context) (time.Duration, error) {
		count++
		return commandLine(nil, "runc", "--root", filepath.Join(dir, "runc"), "run", "--bundle", bundle, fmt.Sprintf("bench%d", count))(ctx)
	}
	_, err = run(ctx)
	return run, err
}

// sdk starts a process with E2B's SDK, which makes a sandbox and runs a command in
// it for every line that it reads, and answers with the milliseconds. Empty runtime
// means the node's default.
func sdk(ctx context.Context, n *node, runtime string) (run func(context.Context) (time.Duration, error), end func(), err error) {
	key, err := n.output(ctx, "key", "create", "-q")
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, "node", "bench/sdk.cjs", said, runtime)
	cmd.Env = append(os.Environ(), "E2B_API_KEY="+strings.TrimSpace(key), "E2B_API_URL="+n.url, "E2B_SANDBOX_URL="+n.url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	end = func() {
		_ = in.Close()
		_ = cmd.Wait()
	}
	lines := bufio.NewScanner(out)
	run = func(context.Context) (time.Duration, error) {
		if _, err := io.WriteString(in, "go\n"); err != nil {
			return 0, err
		}
		if !lines.Scan() {
			return 0, fmt.Errorf("the SDK's process ended: %w", lines.Err())
		}
		var ms float64
		if _, err := fmt.Sscanf(lines.Text(), "%g", &ms); err != nil {
			return 0, fmt.Errorf("the SDK's process said %q", lines.Text())
		}
		return time.Duration(ms * float64(time.Millisecond)), nil
	}
	if _, err := run(ctx); err != nil {
		end()
		return nil, nil, err
	}
	return run, end, nil
}
