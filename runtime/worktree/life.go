package worktree

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/atoll-run/atoll/sandbox"
)

// Create implements sandbox.Runtime. The repository's .atoll/setup, if it has
// one, has run in the sandbox when Create returns.
func (r *Runtime) Create(ctx context.Context, spec sandbox.Spec) error {
	const op = "worktree.Create"
	return r.make(ctx, op, spec, func(b *box) error {
		revision := spec.Labels[LabelBase]
		if revision == "" {
			revision = "HEAD"
		}
		repo, err := openRepository(ctx, op, spec.Root.Path)
		if err != nil {
			return err
		}
		if b.rec.Base, err = repo.resolve(ctx, op, revision); err != nil {
			return err
		}
		if err := b.prepare(ctx, op, repo, spec.Labels[LabelBranch]); err != nil {
			return err
		}
		if err := b.lay(ctx, repo); err != nil {
			return sandbox.E(op, "", spec.ID, err)
		}
		if err := b.script(ctx, setupScript); err != nil {
			return sandbox.E(op, sandbox.Invalid, spec.ID, err).WithHint("mend " + setupScript + " in the repository")
		}
		return nil
	})
}

// make makes a sandbox whose files are laid out by lay.
func (r *Runtime) make(ctx context.Context, op string, spec sandbox.Spec, lay func(b *box) error) error {
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	if err := r.caps.Check(op, spec); err != nil {
		return err
	}
	for _, m := range spec.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			return sandbox.E(op, sandbox.Invalid, spec.ID, err)
		}
	}
	b, err := r.add(op, spec)
	if err != nil {
		return err
	}
	defer b.unlock()
	if err := b.bringUp(ctx, op, lay); err != nil {
		b.unpin(context.WithoutCancel(ctx))
		if removeErr := b.remove(); removeErr != nil {
			r.log.Error("could not remove a sandbox that did not come up", "id", spec.ID, "error", removeErr)
		}
		return err
	}
	return nil
}

func (b *box) bringUp(ctx context.Context, op string, lay func(b *box) error) error {
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return sandbox.E(op, sandbox.Internal, b.id, err)
	}
	if b.r.cgroups != nil {
		if err := b.r.cgroups.create(b.id, b.resources()); err != nil {
			return sandbox.E(op, sandbox.Internal, b.id, err)
		}
	}
	if err := lay(b); err != nil {
		return err
	}
	if err := b.boot(ctx); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return sandbox.E(op, "", b.id, err)
	}
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	if b.state == sandbox.Error {
		return sandbox.Errorf(op, sandbox.Internal, b.id, "%s", b.reason)
	}
	b.state = sandbox.Running
	return nil
}

// branchName allows what git does, less what is easily misread. The rest of
// git's rules is in validBranch.
var branchName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/+-]*$`)

// maxBranch is how many bytes the name of a branch may have.
const maxBranch = 200

func validBranch(name string) bool {
	return len(name) <= maxBranch && branchName.MatchString(name) && !strings.Contains(name, "..") && !strings.Contains(name, "//") &&
		!strings.Contains(name, "/.") && !strings.HasSuffix(name, "/") && !strings.HasSuffix(name, ".") &&
		!strings.Contains(name+"/", ".lock/") && name != "HEAD"
}

// prepare decides what a sandbox needs before its files: branch (if empty, one
// named for the sandbox), ports, base. Its base commit is known.
func (b *box) prepare(ctx context.Context, op string, repo *repository, branch string) error {
	if branch == "" {
		branch = "atoll/" + b.id
	}
	if !validBranch(branch) {
		return sandbox.Errorf(op, sandbox.Invalid, b.id, "%q is no name for a branch", branch)
	}
	if _, err := b.r.base(ctx, op, repo, b.rec.Base); err != nil {
		return err
	}
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	taken := map[int]bool{}
	for _, other := range b.r.boxes {
		taken[other.rec.Ports] = true
	}
	ports, ok := freePorts(taken)
	if !ok {
		return sandbox.Errorf(op, sandbox.Exhausted, b.id, "all blocks of ports are taken")
	}
	b.rec.Branch, b.rec.Bases = branch, baseName(repo, b.rec.Base)
	b.rec.Ports, b.rec.UID, b.rec.GID = ports, repo.uid, repo.gid
	b.rec.Objects = repo.objects
	return nil
}

// lay puts the files of a new sandbox in place.
func (b *box) lay(ctx context.Context, repo *repository) error {
	if err := b.makeDirs(); err != nil {
		return err
	}
	// Each is a process; they do not depend on each other.
	var refs, name, email string
	var refsErr, pinErr error
	var calls sync.WaitGroup
	calls.Go(func() { refs, refsErr = repo.refs(ctx) })
	calls.Go(func() { name, email = repo.person(ctx) })
	calls.Go(func() { pinErr = repo.pin(ctx, b.r.ref+b.id, b.rec.Base) })
	calls.Wait()
	if err := errors.Join(refsErr, pinErr); err != nil {
		return err
	}
	extra := map[string]string{
		"HEAD":                       "ref: refs/heads/" + b.rec.Branch + "\n",
		"refs/heads/" + b.rec.Branch: b.rec.Base + "\n",
		"packed-refs":                refs,
		"config":                     fmt.Sprintf("[user]\n\tname = %s\n\temail = %s\n", quoteConfig(name), quoteConfig(email)),
		"info/exclude":               "",
	}
	for _, file := range []string{"shallow", "info/exclude"} {
		if text, err := os.ReadFile(filepath.Join(repo.git, file)); err == nil {
			extra[file] = string(text)
		}
	}
	objects := make([]string, len(b.rec.Objects))
	for i := range objects {
		objects[i] = objectsDir + strconv.Itoa(i)
	}
	if err := layGit(b.path(gitName), repo.format, objects, extra); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(b.r.dir, "bases", b.rec.Bases, "index"), b.path(gitName+"/index")); err != nil {
		return err
	}
	if err := b.copyIgnored(ctx, repo); err != nil {
		return err
	}
	return b.giveAway()
}

// makeDirs makes the directories that every sandbox has.
func (b *box) makeDirs() error {
	for _, name := range []string{layersName + "/upper", layersName + "/work", homeName, tempName} {
		if err := os.MkdirAll(b.path(name), 0o755); err != nil {
			return err
		}
	}
	return os.Chmod(b.path(tempName), 0o777|os.ModeSticky)
}

// giveAway gives the files of a sandbox to whom it acts as.
func (b *box) giveAway() error {
	for _, name := range []string{layersName, gitName, homeName, tempName} {
		if err := giveTo(b.path(name), b.rec.UID, b.rec.GID); err != nil {
			return err
		}
	}
	return nil
}

// quoteConfig writes a value as git's configuration files have it.
func quoteConfig(value string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(value) + `"`
}

// unpin lets git collect the base again; the repository may be gone by now.
func (b *box) unpin(ctx context.Context) {
	if b.rec.Base == "" {
		return
	}
	info, err := os.Stat(b.rec.Spec.Root.Path)
	if err == nil {
		repo := &repository{path: b.rec.Spec.Root.Path}
		repo.uid, repo.gid = owner(info)
		err = repo.unpin(ctx, b.r.ref+b.id)
	}
	if err != nil {
		b.r.log.Info("the base of a sandbox stays pinned in its repository", "id", b.id, "error", err)
	}
}

// Dial implements sandbox.Runtime. Without root, only the guest can be reached
// in a sandbox that has a network of its own.
func (r *Runtime) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	const op = "worktree.Dial"
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id, "no such port: %d", port)
	}
	b, err := r.find(ctx, op, id, sandbox.Running)
	if err != nil {
		return nil, err
	}
	defer b.unlock()
	if port != sandbox.GuestPort && b.rec.Spec.Network != sandbox.NetworkHost && os.Geteuid() != 0 {
		return nil, sandbox.Errorf(op, sandbox.Unsupported, id, "only root can enter a sandbox's network").WithHint(
			"run the daemon as root, or give the sandbox the host's network")
	}
	conn, err := b.dial(ctx, port)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
			return nil, sandbox.E(op, "", id, err)
		}
		return nil, sandbox.E(op, sandbox.Unavailable, id, err)
	}
	return conn, nil
}

// Pause implements sandbox.Runtime.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.setPaused(ctx, "worktree.Pause", id, true)
}

// Resume implements sandbox.Runtime.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.setPaused(ctx, "worktree.Resume", id, false)
}

func (r *Runtime) setPaused(ctx context.Context, op, id string, paused bool) error {
	b, err := r.find(ctx, op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.unlock()
	if b.rec.Paused == paused {
		return nil
	}
	if err := b.freeze(ctx, paused); err != nil {
		_ = b.freeze(context.WithoutCancel(ctx), b.rec.Paused)
		return sandbox.E(op, "", id, err)
	}
	if err := b.change(func(rec *record) { rec.Paused = paused }); err != nil {
		return sandbox.E(op, sandbox.Internal, id, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.state != sandbox.Error {
		b.state = sandbox.Running
		if paused {
			b.state = sandbox.Paused
		}
	}
	return nil
}

// Stats implements sandbox.Runtime.
func (r *Runtime) Stats(ctx context.Context, id string) (sandbox.Stats, error) {
	b, err := r.find(ctx, "worktree.Stats", id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return sandbox.Stats{}, err
	}
	defer b.unlock()
	return b.stats(), nil
}

// Destroy implements sandbox.Runtime. The repository's .atoll/archive, if it has
// one, runs first, in a jail with the sandbox's files; its failure is logged and
// stops nothing.
func (r *Runtime) Destroy(ctx context.Context, id string) error {
	const op = "worktree.Destroy"
	b, err := r.find(ctx, op, id, sandbox.Running, sandbox.Paused, sandbox.Error, sandbox.Creating)
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer b.unlock()
	b.end()
	if err := b.script(ctx, archiveScript); err != nil {
		r.log.Warn("the archive script failed", "id", id, "error", err)
	}
	b.unpin(context.WithoutCancel(ctx))
	if err := b.remove(); err != nil {
		return sandbox.E(op, sandbox.Internal, id, err)
	}
	return nil
}

// traffic reads how many bytes a process's network received and sent, loopback
// left out.
func traffic(pid int) (rx, tx int64) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, ok := strings.Cut(strings.TrimSpace(lines.Text()), ":")
		fields := strings.Fields(rest)
		if !ok || name == "lo" || len(fields) < 9 {
			continue
		}
		received, err1 := strconv.ParseInt(fields[0], 10, 64)
		sent, err2 := strconv.ParseInt(fields[8], 10, 64)
		if errors.Join(err1, err2) == nil {
			rx, tx = rx+received, tx+sent
		}
	}
	return rx, tx
}
