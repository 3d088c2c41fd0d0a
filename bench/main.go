// Command bench measures the built binary, and beside it in the same run and on
// the same root file system bubblewrap and runc, and E2B's own SDK against a node.
// It writes JSON and a table. It asserts nothing: a measurement is no test.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/internal/machine"
)

// report is everything that was measured.
type report struct {
	Date    string `json:"date"`
	Machine string `json:"machine"`
	Version string `json:"version"` // of atoll
	// Sandbox is what `atoll bench sandbox` printed, by runtime.
	Sandbox map[string]json.RawMessage `json:"sandbox"`
	// Beside is from the start of a command to its first output, interleaved.
	Beside []series `json:"beside"`
	// Absent says what could not be measured, and why.
	Absent []string `json:"absent,omitempty"`
}

func main() {
	n := flag.Int("n", 30, "how many `times` each is measured")
	binary := flag.String("atoll", "bin/atoll", "the binary to measure")
	jsonFile := flag.String("json", "build/bench.json", "where the figures go")
	tableFile := flag.String("table", "docs/performance.md", "where the table goes")
	readmeFile := flag.String("readme", "README.md", "where a short table goes, between its marks")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, *binary, *n, *jsonFile, *tableFile, *readmeFile); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context, binary string, n int, jsonFile, tableFile, readmeFile string) (err error) {
	if n < 1 {
		return errors.New("-n must be at least 1")
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "atoll-bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	progress("starting a node")
	node, err := startNode(ctx, binary, filepath.Join(dir, "home"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.stop()) }()
	version, err := node.output(ctx, "version")
	if err != nil {
		return err
	}
	rep := report{
		Date: time.Now().UTC().Format(time.DateOnly), Machine: machine.Describe(),
		Version: strings.TrimSpace(version), Sandbox: map[string]json.RawMessage{},
	}

	progress("extracting the root of the base image")
	root := filepath.Join(dir, "root")
	if err := node.extract(ctx, root); err != nil {
		return err
	}
	subjects, absent, closeAll := subjects(ctx, node, root, dir)
	defer closeAll()
	rep.Absent = absent
	if rep.Beside, err = rounds(ctx, subjects, n); err != nil {
		return err
	}
	for _, runtime := range []string{"gvisor", "worktree", "microvm"} {
		n := n
		if runtime == "microvm" { // last, since the node holds machines ready from the first on
			n = min(n, emulated)
			if err := rep.machines(ctx, node, n); err != nil {
				return err
			}
		}
		progress("atoll bench sandbox --runtime %s", runtime)
		figures, err := node.output(ctx, "bench", "sandbox", "--runtime", runtime, "-n", fmt.Sprint(n), "-o", "json")
		if err != nil {
			rep.Absent = append(rep.Absent, runtime+": "+firstLine(err.Error()))
			continue
		}
		rep.Sandbox[runtime] = json.RawMessage(figures)
	}
	return rep.write(jsonFile, tableFile, readmeFile)
}

// emulated is how often machines are measured at most, which take seconds where they are emulated.
const emulated = 10

// pace is how long nothing is asked for, so that the pool is full.
const pace = 3 * time.Second

// rounds is interleave, announced.
func rounds(ctx context.Context, subjects []subject, n int) ([]series, error) {
	progress("%d rounds of: %s", n, names(subjects))
	return interleave(ctx, subjects, n)
}

// machines measures E2B's SDK on machines with a kernel of their own, if there are any: as fast as they come, which is
// faster than an emulated pool is filled again, and at a pace at which it is full.
func (r *report) machines(ctx context.Context, node *node, n int) error {
	const name = "E2B SDK, on microvm"
	run, end, err := sdk(ctx, node, "microvm")
	if err != nil {
		r.Absent = append(r.Absent, name+": "+firstLine(err.Error()))
		return nil
	}
	defer end()
	paced := func(ctx context.Context) (time.Duration, error) {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(pace):
			return run(ctx)
		}
	}
	for _, s := range []subject{{name + ": create and first command, one after the other", run}, {name + fmt.Sprintf(": the same, one in %v", pace), paced}} {
		more, err := rounds(ctx, []subject{s}, n)
		if err != nil {
			return err
		}
		r.Beside = append(r.Beside, more...)
	}
	return nil
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }

// firstLine keeps a cell of a table short.
func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return strings.ReplaceAll(line, "|", "/")
}

// a node is a running `atoll up` with a state directory of its own.
type node struct {
	binary string
	env    []string
	url    string
	cmd    *exec.Cmd
	log    *os.File
}

// startNode starts a node and waits until it answers and the base image exists.
// Images are shared with `make demo`.
func startNode(ctx context.Context, binary, home string) (*node, error) {
	images, err := filepath.Abs("build/images")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(images, 0o755), os.MkdirAll(home, 0o700)); err != nil {
		return nil, err
	}
	if err := os.Symlink(images, filepath.Join(home, "images")); err != nil {
		return nil, err
	}
	n := &node{binary: binary, env: append(os.Environ(), "ATOLL_HOME="+home)}
	if n.log, err = os.Create(filepath.Join(home, "log")); err != nil {
		return nil, err
	}
	n.cmd = exec.Command(binary, "up")
	n.cmd.Env, n.cmd.Stdout, n.cmd.Stderr = append(n.env, "ATOLL_ADDR=127.0.0.1:0"), n.log, n.log
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	if err := n.ready(ctx, home); err != nil {
		printed, _ := os.ReadFile(n.log.Name())
		return nil, errors.Join(err, n.stop(), fmt.Errorf("the node printed:\n%s", printed))
	}
	return n, nil
}

// ready waits until the daemon says where it listens and a sandbox has run.
func (n *node) ready(ctx context.Context, home string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var endpoint struct{ URL string }
	for endpoint.URL == "" {
		if text, err := os.ReadFile(filepath.Join(home, "daemon.json")); err == nil {
			if err := json.Unmarshal(text, &endpoint); err != nil {
				return err
			}
			break
		}
		select {
		case <-ctx.Done():
			return errors.New("the node does not answer")
		case <-tick.C:
		}
	}
	n.url = endpoint.URL
	_, err := n.output(ctx, "run", "--rm", "base", "--", "true")
	return err
}

// output runs an atoll command for the node and returns what it printed.
func (n *node) output(ctx context.Context, args ...string) (string, error) {
	cmd := n.command(ctx, args...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("atoll %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}

func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, n.binary, args...)
	cmd.Env = n.env
	return cmd
}

// extract lays out the root of the base image in dir, for those that need it as a
// directory.
func (n *node) extract(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	from := n.command(ctx, "run", "--rm", "--user", "root", "base", "--", "tar", "-C", "/", "--one-file-system", "-cf", "-", ".")
	to := exec.CommandContext(ctx, "tar", "-C", dir, "--exclude=./dev/*", "-xpf", "-")
	var err error
	if to.Stdin, err = from.StdoutPipe(); err != nil {
		return err
	}
	if err := errors.Join(from.Start(), to.Start()); err != nil {
		return err
	}
	if err := errors.Join(to.Wait(), from.Wait()); err != nil {
		return fmt.Errorf("extracting the base image: %w", err)
	}
	for _, point := range []string{"proc", "sys", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, point), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// stop removes all sandboxes and ends the daemon.
func (n *node) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := n.output(ctx, "rm", "--all", "-f")
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(30*time.Second, func() { _ = n.cmd.Process.Kill() })
	defer kill.Stop()
	_ = n.cmd.Wait() // how a daemon ends that was told to is its own affair
	return errors.Join(err, n.log.Close())
}
