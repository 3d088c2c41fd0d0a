package worktree

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/sandbox"
)

// bigRepo makes a repository of 15,000 files in 300 directories.
func bigRepo(b *testing.B) string {
	repo := newRepo(b)
	for dir := range 300 {
		for file := range 50 {
			put(b, repo, fmt.Sprintf("dir%d/file%d.go", dir, file), fmt.Sprintf("package dir%d // %d\n", dir, file))
		}
	}
	gitIn(b, repo, "add", "-A")
	gitIn(b, repo, "commit", "-qm", "big")
	return repo
}

// spread reports the median and the 95th percentile in milliseconds.
func spread(b *testing.B, what string, times []time.Duration) {
	slices.Sort(times)
	ms := func(q float64) float64 { return float64(times[int(q*float64(len(times)-1))]) / 1e6 }
	b.ReportMetric(ms(0.5), what+"-p50-ms")
	b.ReportMetric(ms(0.95), what+"-p95-ms")
}

// BenchmarkLife measures what a user waits for, on a repository of 15,000 files
// whose base was checked out before.
func BenchmarkLife(b *testing.B) {
	repo, r := bigRepo(b), open(b, b.TempDir())
	began := time.Now()
	start(b, r, repo)
	b.Logf("measured: FR1.1 first create on a commit (checkout of 15,000 files included): %v", time.Since(began))
	var create, exec, status, snapshot, restore, destroy []time.Duration
	measure := func(into *[]time.Duration, f func() error) {
		began := time.Now()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		*into = append(*into, time.Since(began))
	}
	for b.Loop() {
		spec := specOf(repo)
		spec.ID = sandbox.NewID()
		measure(&create, func() error { return r.Create(b.Context(), spec) })
		c := guest.New(func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, spec.ID, sandbox.GuestPort) }, guest.Options{})
		run := func(args ...string) func() error {
			return func() error {
				out, err := c.Run(b.Context(), guest.Command{Args: args, Dir: Workdir})
				if err == nil && (out.ExitCode != 0 || args[0] == "git" && len(out.Stdout) > 0) {
					err = fmt.Errorf("%v: exit %d, %s%s", args, out.ExitCode, out.Stdout, out.Stderr)
				}
				return err
			}
		}
		measure(&exec, run("/bin/true"))
		measure(&status, run("git", "status", "--porcelain"))
		c.CloseIdle()
		dir := b.TempDir()
		measure(&snapshot, func() error { return r.Snapshot(b.Context(), spec.ID, dir, sandbox.SnapshotOptions{}) })
		fork := specOf(repo)
		fork.ID = sandbox.NewID()
		measure(&restore, func() error { return r.Restore(b.Context(), fork, dir) })
		measure(&destroy, func() error { return r.Destroy(b.Context(), fork.ID) })
		if err := r.Destroy(b.Context(), spec.ID); err != nil {
			b.Fatal(err)
		}
	}
	for what, times := range map[string][]time.Duration{
		"create": create, "exec": exec, "git-status": status, "snapshot": snapshot, "restore": restore, "destroy": destroy,
	} {
		spread(b, what, times)
	}
}
