package worktree

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/atoll-run/atoll/sandbox"
)

// repository is a user's repository, which git of the host works in with its
// owner's rights and without any hook.
type repository struct {
	path     string // what the user named: a working tree or a bare repository
	git      string // its git directory, absolute
	objects  []string
	uid, gid int // its owner
	format   string
}

// careful is what every call of git is told first: nothing that a repository
// names is executed, whoever wrote it.
var careful = []string{
	"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false",
	"-c", "core.pager=cat", "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "commit.gpgSign=false",
	"-c", "submodule.recurse=false", "-c", "protocol.ext.allow=never", "-c", "safe.directory=*", "-c", "advice.detachedHead=false",
}

// openRepository finds the repository that path lies in.
func openRepository(ctx context.Context, op, path string) (*repository, error) {
	const hint = "name the directory of a git repository that has a commit"
	info, err := os.Stat(path)
	if err != nil || !filepath.IsAbs(path) {
		return nil, sandbox.Errorf(op, sandbox.Invalid, path, "not a directory that we can read").WithHint(hint)
	}
	r := &repository{path: path}
	r.uid, r.gid = owner(info)
	out, err := r.run(ctx, nil, "rev-parse", "--absolute-git-dir", "--git-path", "objects", "--show-object-format")
	if err != nil {
		if ctx.Err() != nil {
			return nil, sandbox.E(op, "", path, ctx.Err())
		}
		return nil, sandbox.E(op, sandbox.Invalid, path, err).WithHint(hint)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != 3 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, path, "git describes the repository as %q", out)
	}
	r.git, r.format = lines[0], lines[2]
	objects := lines[1]
	if !filepath.IsAbs(objects) {
		objects = filepath.Join(path, objects)
	}
	r.objects = withAlternates(objects)
	return r, nil
}

// owner is who a repository belongs to, and so who its sandboxes act as. We can
// act as somebody else only if we are root.
func owner(info os.FileInfo) (uid, gid int) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 {
		return os.Geteuid(), os.Getegid()
	}
	return int(st.Uid), int(st.Gid)
}

// maxAlternates bounds the object directories of one repository.
const maxAlternates = 16

// withAlternates returns an object directory and those that it borrows from.
func withAlternates(objects string) []string {
	all := []string{objects}
	for i := 0; i < len(all) && len(all) < maxAlternates; i++ {
		text, err := os.ReadFile(filepath.Join(all[i], "info", "alternates"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			dir := strings.TrimSpace(line)
			if dir == "" || strings.HasPrefix(dir, "#") {
				continue
			}
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(all[i], dir)
			}
			all = append(all, dir)
		}
	}
	return all
}

// run runs git in the repository and returns what it prints.
func (r *repository) run(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	var out bytes.Buffer
	err := r.stream(ctx, nil, stdin, &out, args...)
	return out.String(), err
}

// stream runs git in the repository. What it says on stderr is in the error.
func (r *repository) stream(ctx context.Context, env []string, stdin io.Reader, stdout io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "git", append(append([]string{}, careful...), args...)...)
	cmd.Dir, cmd.Stdin, cmd.Stdout = r.path, stdin, stdout
	var complaint tail
	cmd.Stderr = &complaint
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + homeOf(r.uid), "LC_ALL=C", "GIT_TERMINAL_PROMPT=0", "GIT_OPTIONAL_LOCKS=0"}, env...)
	if r.uid != os.Geteuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(r.uid), Gid: uint32(r.gid)}}
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("git %s: %w: %s", args[0], err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

// homeOf is where a user keeps the settings of git.
func homeOf(uid int) string {
	if uid == os.Geteuid() {
		return os.Getenv("HOME")
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.HomeDir
	}
	return "/nonexistent"
}

// isObjectName reports whether s is the whole hash of a git object, SHA-1 or SHA-256.
func isObjectName(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && (len(s) == 40 || len(s) == 64)
}

// resolve finds the commit that a revision names.
func (r *repository) resolve(ctx context.Context, op, revision string) (string, error) {
	out, err := r.run(ctx, nil, "rev-parse", "--verify", "--end-of-options", revision+"^{commit}")
	commit := strings.TrimSpace(out)
	if ctx.Err() != nil {
		return "", sandbox.E(op, "", r.path, ctx.Err())
	}
	if err != nil || !isObjectName(commit) {
		return "", sandbox.Errorf(op, sandbox.Invalid, r.path, "no commit is called %q: %w", revision, err).WithHint(
			"commit something first, or name another base with the label worktree.base")
	}
	return commit, nil
}

// refs lists the repository's branches and tags in the form of packed-refs, the
// branches as those of a remote called origin.
func (r *repository) refs(ctx context.Context) (string, error) {
	out, err := r.run(ctx, nil, "for-each-ref", "--format=%(objectname) %(refname)", "refs/heads", "refs/tags")
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for line := range strings.Lines(out) {
		b.WriteString(strings.Replace(line, " refs/heads/", " refs/remotes/origin/", 1))
	}
	return b.String(), nil
}

// person is who commits are by, as the repository's owner set it.
func (r *repository) person(ctx context.Context) (name, email string) {
	name, email = "Atoll", "atoll@localhost"
	out, err := r.run(ctx, nil, "config", "--null", "--get-regexp", `^user\.(name|email)$`)
	if err != nil { // none is set
		return name, email
	}
	for entry := range strings.SplitSeq(out, "\x00") {
		switch key, value, _ := strings.Cut(entry, "\n"); {
		case value == "" || strings.ContainsAny(value, "\n\r"):
		case key == "user.name":
			name = value
		case key == "user.email":
			email = value
		}
	}
	return name, email
}

// pin keeps git's garbage collection away from a commit that a sandbox builds on.
func (r *repository) pin(ctx context.Context, ref, commit string) error {
	_, err := r.run(ctx, nil, "update-ref", ref, commit)
	return err
}

// unpin undoes pin.
func (r *repository) unpin(ctx context.Context, ref string) error {
	_, err := r.run(ctx, nil, "update-ref", "-d", ref)
	return err
}
