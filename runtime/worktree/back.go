package worktree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// How work comes back: git runs in a jail with the sandbox's files and makes a
// commit of them, its objects come out as a pack, and git of the host takes the
// pack, checked, into the user's repository. Nothing of the sandbox is executed
// or believed on the way.

// inJail runs a shell script with git in a jail that sees the sandbox's files,
// its working tree read-only, while the sandbox stands still.
func (b *box) inJail(ctx context.Context, stdout io.Writer, env []string, script string, args ...string) error {
	j := b.jail(false)
	j.network, j.netns = sandbox.NetworkNone, ""
	if b.r.cgroups != nil {
		// The sandbox's own groups are frozen.
		group := b.id + "-git"
		if err := b.r.cgroups.create(group, b.resources()); err != nil {
			return err
		}
		defer func() { _ = b.r.cgroups.remove(group) }()
		j.cgroup = func(pid int) error { return b.r.cgroups.add(group, pid) }
	}
	j.Env = append(j.Env, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0", "LC_ALL=C")
	j.Env = append(j.Env, env...)
	// Within the jail too, git is spared what the repository would have it run.
	quoted := strings.Join(careful, "' '")
	j.Command = append([]string{"/bin/sh", "-c", "set -e\ng() { git '" + quoted + "' \"$@\"; }\n" + script, "git"}, args...)
	j.stdout = stdout
	return b.still(ctx, func() error { return j.run(ctx) })
}

// states in which a sandbox's files can be looked at: also when it is dead.
var anyState = []sandbox.State{sandbox.Running, sandbox.Paused, sandbox.Error}

// Diff writes what the sandbox changed against its base, committed or not, as a
// patch that git apply takes. Ignored files are left out.
func (r *Runtime) Diff(ctx context.Context, id string, w io.Writer) error {
	const op = "worktree.Diff"
	b, err := r.find(ctx, op, id, anyState...)
	if err != nil {
		return err
	}
	defer b.unlock()
	// An index of its own: the sandbox's stays as it is.
	err = b.inJail(ctx, w, nil, `
cp .git/index /tmp/.atoll-index 2>/dev/null || :
trap 'rm -f /tmp/.atoll-index' EXIT
export GIT_INDEX_FILE=/tmp/.atoll-index
g add --all
g diff --cached --binary --no-ext-diff --no-textconv --ignore-submodules=all "$1"`, b.rec.Base)
	if err != nil {
		return sandbox.E(op, "", id, err)
	}
	return nil
}

// Commit commits what the sandbox has changed and not committed, as its user,
// and returns the commit that then is its head. Hooks do not run. Ignored files
// are left out.
func (r *Runtime) Commit(ctx context.Context, id, message string) (commit string, err error) {
	const op = "worktree.Commit"
	b, err := r.find(ctx, op, id, anyState...)
	if err != nil {
		return "", err
	}
	defer b.unlock()
	return b.commit(ctx, op, message)
}

func (b *box) commit(ctx context.Context, op, message string) (string, error) {
	if message == "" {
		message = "Work of sandbox " + b.id
	}
	var out bytes.Buffer
	err := b.inJail(ctx, limitWriter(&out, 1<<20), nil, `
g add --all
# A repository inside the repository would come back as a mere name of a commit.
nested=$(g diff --cached --raw --no-renames --no-abbrev "$2" | sed -n 's/^:000000 160000 [^\t]*\t//p')
if [ -n "$nested" ] && [ ! -e .gitmodules ]; then
	g reset --quiet
	echo "there are git repositories inside the working tree, whose files would be lost: $nested" >&2
	exit 1
fi
g diff --cached --quiet --ignore-submodules=none HEAD -- || g commit --quiet --no-verify --no-gpg-sign -m "$1" >&2
g rev-parse --verify HEAD^{commit}`, message, b.rec.Base)
	if err != nil {
		return "", sandbox.E(op, "", b.id, err).WithHint("if a git command in the sandbox was interrupted, remove its .git/index.lock")
	}
	commit := strings.TrimSpace(out.String())
	if !isObjectName(commit) {
		return "", sandbox.Errorf(op, sandbox.Invalid, b.id, "git in the sandbox names its head %q", commit)
	}
	return commit, nil
}

// maxPack bounds what a sandbox may bring back, in bytes.
const maxPack = 4 << 30

// Publish commits what the sandbox has changed and makes its head a branch of
// the user's repository, under the sandbox's own branch name. It returns both.
// The user's working tree stays as it is. A branch of that name that holds other
// work is an error of kind Conflict.
func (r *Runtime) Publish(ctx context.Context, id, message string) (branch, commit string, err error) {
	const op = "worktree.Publish"
	b, err := r.find(ctx, op, id, anyState...)
	if err != nil {
		return "", "", err
	}
	defer b.unlock()
	_, commit, err = b.publish(ctx, op, message)
	return b.rec.Branch, commit, err
}

func (b *box) publish(ctx context.Context, op, message string) (*repository, string, error) {
	repo, err := openRepository(ctx, op, b.rec.Spec.Root.Path)
	if err != nil {
		return nil, "", err
	}
	commit, err := b.commit(ctx, op, message)
	if err != nil {
		return nil, "", err
	}
	ref := "refs/heads/" + b.rec.Branch
	old := ""
	if out, err := repo.run(ctx, nil, "rev-parse", "--verify", "--quiet", ref); err == nil {
		old = strings.TrimSpace(out)
	}
	if err := b.bring(ctx, repo, commit); err != nil {
		return nil, "", sandbox.E(op, "", b.id, err)
	}
	if old == commit {
		return repo, commit, nil
	}
	if old != "" {
		if _, err := repo.run(ctx, nil, "merge-base", "--is-ancestor", old, commit); err != nil {
			return nil, "", sandbox.Errorf(op, sandbox.Conflict, b.id, "the branch %s has commits that the sandbox has not", b.rec.Branch).
				WithHint("rename or remove that branch; the sandbox's work is commit " + commit)
		}
		if head, err := repo.run(ctx, nil, "symbolic-ref", "--quiet", "HEAD"); err == nil && strings.TrimSpace(head) == ref {
			return nil, "", sandbox.Errorf(op, sandbox.Conflict, b.id, "the branch %s is checked out in the repository", b.rec.Branch).
				WithHint("check out another branch there")
		}
	}
	// The old value makes it fail if somebody else moved the branch meanwhile.
	if _, err := repo.run(ctx, nil, "update-ref", "-m", "atoll: sandbox "+b.id, ref, commit, old); err != nil {
		return nil, "", sandbox.E(op, sandbox.Conflict, b.id, err)
	}
	return repo, commit, nil
}

// bring copies the objects of a commit that the repository lacks into it.
func (b *box) bring(ctx context.Context, repo *repository, commit string) error {
	if commit == b.rec.Base {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	packed := make(chan error, 1)
	go func() {
		err := b.inJail(ctx, write, nil, `printf '%s\n^%s\n' "$1" "$2" | g pack-objects --revs --stdout --quiet --thin --delta-base-offset`, commit, b.rec.Base)
		write.Close()
		packed <- err
	}()
	// fsck refuses objects that are not what they should be, such as trees with
	// ".git" in them; the limit is for a sandbox that sends without end.
	_, err = repo.run(ctx, read, "index-pack", "--stdin", "--fix-thin", "--strict",
		fmt.Sprintf("--max-input-size=%d", int64(maxPack)))
	read.Close()
	if err != nil {
		cancel()
		return errors.Join(err, <-packed)
	}
	if err := <-packed; err != nil {
		return err
	}
	// What it refers to must be there too, or be in the base.
	_, err = repo.run(ctx, nil, "rev-list", "--objects", "--quiet", commit, "^"+b.rec.Base)
	return err
}

// limitWriter fails once more than n bytes were written to it.
func limitWriter(w io.Writer, n int64) io.Writer { return &limitedWriter{w, n} }

type limitedWriter struct {
	w    io.Writer
	left int64
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		return 0, unix.EFBIG
	}
	return l.w.Write(p)
}

// MergeOptions and Merged are the words of every runtime with working trees.
type (
	MergeOptions = sandbox.MergeOptions
	Merged       = sandbox.Merged
)

// Conflicts is the cause of an error of kind Conflict when the sandbox and the
// user changed the same lines.
type Conflicts struct{ Files []string }

// Error implements error.
func (c *Conflicts) Error() string {
	return "both the sandbox and the repository changed: " + strings.Join(c.Files, ", ")
}

// Merge publishes the sandbox's work and merges it into the branch that the
// user's repository has checked out, or squashes it into one commit there. On a
// conflict nothing is changed but the published branch, and the cause of the
// error is a *Conflicts. A working tree with changes is refused with Conflict.
func (r *Runtime) Merge(ctx context.Context, id string, o MergeOptions) (Merged, error) {
	return r.takeOver(ctx, "worktree.Merge", id, o.Message, o.Force, func(t *taking) error {
		parents := []string{"-p", t.head}
		message := o.Message
		if !o.Squash {
			parents = append(parents, "-p", t.Work)
			if message == "" {
				message = "Merge the work of sandbox " + id
			}
		} else if message == "" {
			message = "Work of sandbox " + id
		}
		name, email := t.repo.person(ctx)
		env := []string{"GIT_AUTHOR_NAME=" + name, "GIT_AUTHOR_EMAIL=" + email, "GIT_COMMITTER_NAME=" + name, "GIT_COMMITTER_EMAIL=" + email}
		var out bytes.Buffer
		err := t.repo.stream(ctx, env, strings.NewReader(message+"\n"), &out, append([]string{"commit-tree", t.tree}, parents...)...)
		if err != nil {
			return err
		}
		t.Head = strings.TrimSpace(out.String())
		// A fast-forward keeps what the user changed, or refuses.
		_, err = t.repo.run(ctx, nil, "merge", "--ff-only", "--quiet", "--no-verify", t.Head)
		return err
	})
}

// Apply publishes the sandbox's work and puts it into the user's working tree
// and index without a commit. Conflicts and changes are treated as by Merge.
func (r *Runtime) Apply(ctx context.Context, id string, force bool) (Merged, error) {
	return r.takeOver(ctx, "worktree.Apply", id, "", force, func(t *taking) error {
		_, err := t.repo.run(ctx, nil, "read-tree", "-m", "-u", t.head, t.tree)
		return err
	})
}

// taking is a merge under way.
type taking struct {
	Merged
	repo *repository
	head string // the commit that the user's repository has checked out
	tree string // the files after the merge
}

// takeOver does what Merge and Apply have in common: it finds the files after
// the merge without touching the user's, and lets finish put them there.
func (r *Runtime) takeOver(ctx context.Context, op, id, message string, force bool, finish func(*taking) error) (Merged, error) {
	b, err := r.find(ctx, op, id, anyState...)
	if err != nil {
		return Merged{}, err
	}
	defer b.unlock()
	repo, err := openRepository(ctx, op, b.rec.Spec.Root.Path)
	if err != nil {
		return Merged{}, err
	}
	if !force {
		if err := repo.wantClean(ctx, op); err != nil {
			return Merged{}, err
		}
	}
	t := &taking{repo: repo, Merged: Merged{Branch: b.rec.Branch}}
	if _, t.Work, err = b.publish(ctx, op, message); err != nil {
		return Merged{}, err
	}
	if t.head, err = repo.resolve(ctx, op, "HEAD"); err != nil {
		return t.Merged, err
	}
	kept := "the work is kept in the branch " + t.Branch
	out, err := repo.run(ctx, nil, "merge-tree", "--write-tree", "--name-only", "-z", "--no-messages", t.head, t.Work)
	names := strings.Split(strings.TrimRight(out, "\x00"), "\x00")
	if t.tree = names[0]; !isObjectName(t.tree) {
		return t.Merged, sandbox.E(op, "", id, err).WithHint(kept)
	}
	if err != nil {
		return t.Merged, sandbox.E(op, sandbox.Conflict, id, &Conflicts{names[1:]}).WithHint(
			kept + ": merge it by hand, or let the agent take the new state in and merge again")
	}
	changed, err := repo.run(ctx, nil, "diff", "--name-only", "-z", "--no-renames", t.head, t.tree)
	if err != nil {
		return t.Merged, sandbox.E(op, "", id, err).WithHint(kept)
	}
	if changed == "" {
		t.Head = t.head
		return t.Merged, nil
	}
	t.Files = strings.Split(strings.TrimRight(changed, "\x00"), "\x00")
	if err := finish(t); err != nil {
		return t.Merged, sandbox.E(op, sandbox.Conflict, id, err).WithHint(kept)
	}
	return t.Merged, nil
}

// wantClean fails with Conflict if the working tree has changes that are not
// committed, or none at all.
func (r *repository) wantClean(ctx context.Context, op string) error {
	out, err := r.run(ctx, nil, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
	if err != nil {
		return sandbox.E(op, sandbox.Invalid, r.path, err).WithHint("only a repository with a working tree can be merged into; publish a branch instead")
	}
	if out != "" {
		return sandbox.Errorf(op, sandbox.Conflict, r.path, "the working tree has changes that are not committed").WithHint(
			"commit or stash them, or force it: then they are kept, and the merge fails if it would touch them")
	}
	return nil
}
