package worktree

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/sandbox"
)

// agent is a sandbox as an agent sees it.
type agent struct {
	t    testing.TB
	r    *Runtime
	id   string
	spec sandbox.Spec
}

func start(t testing.TB, r *Runtime, repo string, edits ...func(*sandbox.Spec)) *agent {
	t.Helper()
	spec := specOf(repo)
	spec.ID = sandbox.NewID()
	for _, edit := range edits {
		edit(&spec)
	}
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Destroy(context.Background(), spec.ID); err != nil {
			t.Error(err)
		}
	})
	return &agent{t, r, spec.ID, spec}
}

func label(key, value string) func(*sandbox.Spec) {
	return func(s *sandbox.Spec) { s.Labels = map[string]string{key: value} }
}

// try runs a shell script in the working tree.
func (a *agent) try(script string) guest.Output {
	a.t.Helper()
	c := guest.New(func(ctx context.Context) (net.Conn, error) { return a.r.Dial(ctx, a.id, sandbox.GuestPort) }, guest.Options{})
	defer c.CloseIdle()
	out, err := c.Run(a.t.Context(), guest.Command{Args: []string{"/bin/bash", "-c", script}, Dir: Workdir})
	if err != nil {
		a.t.Fatalf("%s: %v", script, err)
	}
	return out
}

// do runs a shell script that must succeed.
func (a *agent) do(script string) string {
	a.t.Helper()
	out := a.try(script)
	if out.ExitCode != 0 {
		a.t.Fatalf("%s: exit %d\n%s%s", script, out.ExitCode, out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

func wantKind(t testing.TB, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Fatalf("got %v, want %s", err, kind)
	}
}

func read(t testing.TB, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// conformance: FR1.1
func TestAnAgentWorksOnABranchOfItsOwn(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	gitIn(t, repo, "tag", "v1")
	a := start(t, r, repo, label(LabelBranch, "fix/it"))
	if got := a.do("git status --porcelain --branch"); got != "## fix/it\n" {
		t.Errorf("git status in a new sandbox says %q", got)
	}
	if got := a.do("git log --format=%s && git tag && git rev-parse --abbrev-ref origin/main && cat README.md"); got != "first\nv1\norigin/main\nhello\n" {
		t.Errorf("the sandbox sees %q", got)
	}
	a.do("echo more >> README.md; git commit -qam second; git checkout -q -b other; git stash list; git gc -q")
	if got := read(t, repo, "README.md"); got != "hello\n" {
		t.Errorf("the user's file became %q", got)
	}
	if got := gitIn(t, repo, "branch", "--format=%(refname:short)"); got != "main\n" {
		t.Errorf("the user's branches became %q", got)
	}
}

func TestDiffShowsAllThatIsNotIgnored(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do(`echo more >> README.md; git commit -qam committed; printf 'new\0binary' > bin.dat; rm src/main.go; echo x > a.log; echo staged > staged; git add staged`)
	before := a.do("git status --porcelain")
	var patch bytes.Buffer
	if err := r.Diff(t.Context(), a.id, &patch); err != nil {
		t.Fatal(err)
	}
	if after := a.do("git status --porcelain"); after != before {
		t.Errorf("Diff changed the sandbox's index: %q became %q", before, after)
	}
	cmd := exec.Command("git", "apply", "--index")
	cmd.Dir, cmd.Stdin = repo, &patch
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git apply: %v\n%s", err, out)
	}
	if got := gitIn(t, repo, "status", "--porcelain"); got != "M  README.md\nA  bin.dat\nD  src/main.go\nA  staged\n" {
		t.Errorf("after applying the patch status is\n%s", got)
	}
}

func TestMergeKeepsTheAgentsHistory(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("echo one > one; git add one; git commit -qm 'the agent did one'; echo two > two")
	put(t, repo, "mine", "user's\n")
	gitIn(t, repo, "add", "mine")
	gitIn(t, repo, "commit", "-qm", "the user went on")

	m, err := r.Merge(t.Context(), a.id, MergeOptions{Message: "take it"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.Files, []string{"one", "two"}) || strings.TrimSpace(gitIn(t, repo, "rev-parse", "HEAD")) != m.Head {
		t.Errorf("Merge reports %+v", m)
	}
	if got := read(t, repo, "one") + read(t, repo, "two") + read(t, repo, "mine"); got != "one\ntwo\nuser's\n" {
		t.Errorf("the files are %q", got)
	}
	log := gitIn(t, repo, "log", "--format=%s")
	for _, want := range []string{"take it", "the agent did one", "the user went on"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if got := gitIn(t, repo, "status", "--porcelain"); got != "" {
		t.Errorf("after the merge the tree is not clean: %q", got)
	}
	gitIn(t, repo, "fsck", "--strict")
	again, err := r.Merge(t.Context(), a.id, MergeOptions{})
	if err != nil || len(again.Files) > 0 || again.Head != m.Head {
		t.Errorf("merging again gives %+v, %v; want nothing to do", again, err)
	}
}

func TestSquashMakesOneCommit(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("for i in 1 2 3; do echo $i > $i; git add $i; git commit -qm step$i; done")
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{Message: "all of it", Squash: true}); err != nil {
		t.Fatal(err)
	}
	if got := gitIn(t, repo, "log", "--format=%s", "main"); got != "all of it\nfirst\n" {
		t.Errorf("the log is %q", got)
	}
}

func TestApplyCommitsNothing(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("echo new > new; rm src/main.go")
	if _, err := r.Apply(t.Context(), a.id, false); err != nil {
		t.Fatal(err)
	}
	if got := gitIn(t, repo, "status", "--porcelain"); got != "A  new\nD  src/main.go\n" {
		t.Errorf("status is %q", got)
	}
	if got := gitIn(t, repo, "log", "--format=%s", "main"); got != "first\n" {
		t.Errorf("the log is %q", got)
	}
}

func TestAConflictIsReportedAndLosesNothing(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("echo agent > README.md; echo kept > other")
	put(t, repo, "README.md", "user\n")
	gitIn(t, repo, "commit", "-qam", "user's")
	head := gitIn(t, repo, "rev-parse", "HEAD")

	m, err := r.Merge(t.Context(), a.id, MergeOptions{})
	wantKind(t, err, sandbox.Conflict)
	var conflicts *Conflicts
	if !errors.As(err, &conflicts) || !slices.Equal(conflicts.Files, []string{"README.md"}) {
		t.Errorf("the conflict is %v", err)
	}
	if got := gitIn(t, repo, "rev-parse", "HEAD"); got != head || gitIn(t, repo, "status", "--porcelain") != "" {
		t.Error("a merge that failed changed the user's repository")
	}
	if got := gitIn(t, repo, "show", m.Branch+":other"); got != "kept\n" {
		t.Errorf("the work in the branch %s is %q", m.Branch, got)
	}
}

func TestADirtyTreeIsKept(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("echo agent > README.md; echo new > new")
	put(t, repo, "src/main.go", "package edited\n")
	_, err := r.Merge(t.Context(), a.id, MergeOptions{})
	wantKind(t, err, sandbox.Conflict)
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, repo, "README.md") + read(t, repo, "src/main.go"); got != "agent\npackage edited\n" {
		t.Errorf("after a forced merge the files are %q", got)
	}
	a.do("echo again > src/main.go")
	_, err = r.Merge(t.Context(), a.id, MergeOptions{Force: true})
	wantKind(t, err, sandbox.Conflict)
	_, err = r.Apply(t.Context(), a.id, true)
	wantKind(t, err, sandbox.Conflict)
	if got := read(t, repo, "src/main.go"); got != "package edited\n" {
		t.Errorf("the user's edit became %q", got)
	}
}

func TestWorkOfADeadSandboxComesBack(t *testing.T) {
	repo, dir := newRepo(t), t.TempDir()
	r := open(t, dir)
	a := start(t, r, repo)
	a.do("echo saved > saved")
	if err := unix.Kill(r.boxes[a.id].rec.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-r.boxes[a.id].gone
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, repo, "saved"); got != "saved\n" {
		t.Errorf("the work came back as %q", got)
	}
}

// conformance: NFR1.3
func TestNothingOfTheSandboxIsExecutedOnTheHost(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	gitIn(t, repo, "config", "core.hooksPath", ".git/hooks") // as a user may have it
	mark := filepath.Join(t.TempDir(), "executed")
	a := start(t, r, repo)
	a.do(`printf '#!/bin/sh\necho pwned > ` + mark + `\n' > /tmp/evil; chmod +x /tmp/evil; cp /tmp/evil evil
for h in pre-commit post-commit post-checkout post-merge reference-transaction post-index-change post-rewrite; do cp /tmp/evil .git/hooks/$h 2>/dev/null || { mkdir -p .git/hooks; cp /tmp/evil .git/hooks/$h; }; done
git config core.fsmonitor /work/evil; git config core.hooksPath /work/.git/hooks; git config core.sshCommand /work/evil
git config uploadpack.packObjectsHook /work/evil; git config filter.x.clean /work/evil; git config filter.x.smudge /work/evil; git config filter.x.process /work/evil
git config diff.external /work/evil; git config diff.x.textconv /work/evil; git config merge.x.driver /work/evil; git config core.pager /work/evil; git config gpg.program /work/evil; git config commit.gpgSign true
echo '* filter=x diff=x merge=x' > .gitattributes; echo work > work.txt`)
	// Its own filter fails, in the jail: that is the sandbox's own loss.
	if err := r.Diff(t.Context(), a.id, io.Discard); err == nil || !strings.Contains(err.Error(), "Directory nonexistent") {
		t.Errorf("Diff: %v, want the complaint of a filter that does not see the host", err)
	}
	a.do("rm .gitattributes")
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Snapshot(t.Context(), a.id, t.TempDir(), sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(mark); err == nil {
		t.Error("a program of the sandbox ran on the host")
	}
	out := a.try(`objects=$(head -n 1 .git/objects/info/alternates); touch $objects/pwned; rm -rf $objects/*; ls -d $objects`)
	if _, err := os.Stat(filepath.Join(repo, ".git/objects/pwned")); err == nil {
		t.Errorf("the sandbox wrote into the user's repository: %s%s", out.Stdout, out.Stderr)
	}
	gitIn(t, repo, "fsck")
}

func TestANestedRepositoryIsNotSilentlyLost(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	a.do("git init -q nested && cd nested && echo x > file && git add file && git -c user.name=a -c user.email=b commit -qm inner")
	_, err := r.Commit(t.Context(), a.id, "")
	if err == nil || !strings.Contains(err.Error(), "nested") {
		t.Errorf("Commit: %v, want an error that names the nested repository", err)
	}
}
