// Package worktree runs sandboxes on git working trees with the host's own
// programs: for coding agents that are trusted with the machine, but not with
// each other's files and not with the user's.
//
// IT IS NOT A SECURITY BOUNDARY. Namespaces, Landlock, a system call filter and
// control groups keep an honest agent from harm; a program that attacks the
// host's kernel meets no second one. Code that nobody vouches for belongs on a
// runtime with a kernel of its own.
//
// A sandbox sees at /work the files of a commit, its base, and what it changed
// lies in an overlay above them, so it costs milliseconds and no copy. Its git
// directory is its own and borrows the objects of the user's repository, which
// it can read and not write: no hook, no configuration and no object that an
// agent writes reaches the user's repository, but by Merge and Apply, which take
// commits as data. Where git of the host has to look at files of a sandbox, it
// runs in a jail like the sandbox's own.
//
// Sandboxes do not depend on the process that made them. Config.Dir holds
//
//	lock            held by the one Runtime that owns the directory
//	bases/          checkouts that sandboxes share
//	s/<id>/         one directory a sandbox, see record
package worktree

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/runtime/feed"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// Name is the word by which users choose this runtime.
const Name = "worktree"

// Workdir is where a sandbox finds its working tree.
const Workdir = workdir

// The labels of a spec that this runtime reads.
const (
	LabelBranch = "worktree.branch" // the branch that the sandbox works on; default "atoll/<id>"
	LabelBase   = "worktree.base"   // the revision that it starts from; default HEAD
	LabelCopy   = "worktree.copy"   // ignored files to copy, as in .atoll/copy, separated by commas
)

// Config says where and how a Runtime keeps its sandboxes.
type Config struct {
	// Dir holds all state. It is made if it is missing. One Runtime at a time may own it.
	Dir string
	// Guest is the host path of the static guest agent.
	Guest string
	// Prefix names the control group under which all sandboxes of this runtime
	// lie; empty means a name derived from Dir. No two directories may share one.
	Prefix string
	// Defaults fills the zero fields of a spec's Resources. Its own zero field
	// Pids means 4096; the other zero fields mean no limit.
	Defaults sandbox.Resources
	// Log receives what happens; nil discards it.
	Log *slog.Logger
}

// Runtime implements sandbox.Runtime on git working trees.
type Runtime struct {
	dir      string
	guest    string
	ref      string // prefix of the references that pin bases in repositories
	defaults sandbox.Resources
	log      *slog.Logger
	caps     sandbox.Capabilities
	cgroups  *cgroups // nil where we may not have any
	lock     *os.File
	feed     feed.Feed
	bases    keyLocks
	stop     chan struct{}
	done     sync.WaitGroup

	mu    sync.Mutex
	boxes map[string]*box
}

var _ sandbox.Runtime = (*Runtime)(nil)

// defaultPids is the limit of processes where nobody set one.
const defaultPids = 4096

// New opens the directory, finds the sandboxes in it again and removes what is
// left of others. It fails with Conflict when another Runtime owns the
// directory, Denied when the host does not let us make namespaces, and
// Unsupported when git is missing.
func New(cfg Config) (*Runtime, error) {
	const op = "worktree.New"
	if _, err := exec.LookPath("git"); err != nil {
		return nil, sandbox.E(op, sandbox.Unsupported, "", err).WithHint("install git")
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, cfg.Dir, err)
	}
	for _, sub := range []string{"bases", "s"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, sandbox.E(op, sandbox.Internal, dir, err)
		}
	}
	sum := sha256.Sum256([]byte(dir))
	unique := hex.EncodeToString(sum[:6])
	r := &Runtime{
		dir: dir, guest: cfg.Guest, ref: "refs/atoll/" + unique + "/", defaults: cfg.Defaults, log: cfg.Log,
		boxes: map[string]*box{}, stop: make(chan struct{}),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if r.defaults.Pids == 0 {
		r.defaults.Pids = defaultPids
	}
	if r.lock, err = supervisor.Lock(dir); err != nil {
		return nil, sandbox.E(op, "", "", err)
	}
	prefix := cfg.Prefix
	if prefix == "" {
		prefix = "atoll-" + unique
	}
	if r.cgroups, err = openCgroups(prefix + "-worktree"); err != nil {
		r.log.Warn("no control groups: memory, CPU and processes of worktree sandboxes are not limited", "error", err)
		r.cgroups = nil
	}
	r.caps = capabilities(r.cgroups != nil, os.Geteuid() == 0)
	if err := r.probe(); err != nil {
		return nil, errors.Join(err, r.release())
	}
	if err := r.adopt(); err != nil {
		return nil, errors.Join(sandbox.E(op, sandbox.Internal, dir, err), r.release())
	}
	if r.cgroups != nil {
		r.done.Go(r.watchMemory)
	}
	return r, nil
}

func capabilities(limits, privileged bool) sandbox.Capabilities {
	c := sandbox.Capabilities{
		Isolation: sandbox.IsolationProcess,
		Roots:     []sandbox.RootKind{sandbox.RootRepository},
		Networks:  []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkHost},
		Pause:     true, Snapshot: true, Changes: true, Mounts: true,
		CPULimit: limits, MemLimit: limits, PidsLimit: limits,
		Persistent: true,
	}
	if privileged { // to enter a network that the node made
		c.Networks = append(c.Networks, sandbox.NetworkSandbox)
	}
	return c
}

// probeTimeout bounds the trial of a jail when a Runtime is opened.
const probeTimeout = 20 * time.Second

// probe makes a jail that does nothing, so that a host where none can be made is
// known before somebody wants a sandbox.
func (r *Runtime) probe() error {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	temp, err := os.MkdirTemp(filepath.Join(r.dir, "bases"), "new-")
	if err != nil {
		return sandbox.E("worktree.New", sandbox.Internal, r.dir, err)
	}
	defer os.RemoveAll(temp)
	for _, sub := range []string{"tree", "layers/upper", "layers/work"} {
		if err := os.MkdirAll(filepath.Join(temp, sub), 0o755); err != nil {
			return sandbox.E("worktree.New", sandbox.Internal, r.dir, err)
		}
	}
	j := jail{
		plan: plan{
			Hostname: "probe", Base: filepath.Join(temp, "tree"), Upper: filepath.Join(temp, "layers/upper"),
			Work: filepath.Join(temp, "layers/work"), Dir: "/", Command: []string{"/bin/true"},
		},
		uid: os.Geteuid(), gid: os.Getegid(), network: sandbox.NetworkNone,
	}
	if err := j.run(ctx); err != nil {
		return sandbox.E("worktree.New", "", "", err)
	}
	return nil
}

// Name implements sandbox.Runtime.
func (r *Runtime) Name() string { return Name }

// Capabilities implements sandbox.Runtime.
func (r *Runtime) Capabilities() sandbox.Capabilities { return r.caps }

// List implements sandbox.Runtime.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Status, error) {
	if err := ctx.Err(); err != nil {
		return nil, sandbox.E("worktree.List", "", "", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]sandbox.Status, 0, len(r.boxes))
	for id, b := range r.boxes {
		all = append(all, sandbox.Status{ID: id, State: b.state, Reason: b.reason, Spec: b.rec.Spec.Clone()})
	}
	slices.SortFunc(all, func(a, b sandbox.Status) int { return strings.Compare(a.ID, b.ID) })
	return all, nil
}

// Watch implements sandbox.Runtime.
func (r *Runtime) Watch(ctx context.Context) <-chan sandbox.Event { return r.feed.Watch(ctx) }

// Close implements sandbox.Runtime.
func (r *Runtime) Close() error {
	r.mu.Lock()
	select {
	case <-r.stop:
		r.mu.Unlock()
		return nil
	default:
		close(r.stop)
	}
	r.mu.Unlock()
	r.done.Wait()
	r.feed.Close()
	return r.release()
}

// release lets go of the directory and removes control groups that nobody is in.
func (r *Runtime) release() error {
	if r.cgroups != nil {
		r.cgroups.close()
	}
	return r.lock.Close()
}

// adopt finds the sandboxes of the process before us.
func (r *Runtime) adopt() error {
	entries, err := os.ReadDir(filepath.Join(r.dir, "s"))
	if err != nil {
		return err
	}
	inUse := map[string]bool{}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(r.dir, "s", e.Name())
		rec, err := loadRecord(dir)
		if err != nil {
			// It was being made or removed when the process before us was killed.
			r.log.Info("removing what is left of a sandbox", "id", e.Name(), "reason", err)
			errs = append(errs, r.erase(e.Name()))
			continue
		}
		inUse[rec.Bases] = true
		b := newBox(r, rec)
		r.boxes[e.Name()] = b
		b.findAgain()
	}
	if r.cgroups != nil {
		for _, id := range r.cgroups.list() {
			if r.boxes[id] == nil {
				errs = append(errs, r.erase(id))
			}
		}
	}
	errs = append(errs, r.pruneBases(inUse))
	return errors.Join(errs...)
}

// erase removes all that there is of a sandbox but its pin.
func (r *Runtime) erase(id string) error {
	var err error
	if r.cgroups != nil {
		r.cgroups.kill(id)
		err = r.cgroups.remove(id)
	}
	// The record goes first: a directory without one is removed by whoever finds it.
	dir := filepath.Join(r.dir, "s", id)
	_ = os.Remove(filepath.Join(dir, supervisor.RecordName))
	return errors.Join(err, removeAll(dir))
}

// memoryEvery is how often sandboxes are asked whether they ran out of memory.
const memoryEvery = time.Second

// watchMemory tells when a process of a sandbox was killed for want of memory.
func (r *Runtime) watchMemory() {
	seen := map[string]int64{}
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-tick.C:
		}
		r.mu.Lock()
		running := map[string]bool{}
		for id, b := range r.boxes {
			running[id] = b.state == sandbox.Running
		}
		r.mu.Unlock()
		for id := range seen {
			if !running[id] {
				delete(seen, id)
			}
		}
		for id, is := range running {
			if !is {
				continue
			}
			if n := r.cgroups.oomKills(id); n > seen[id] {
				seen[id] = n
				r.feed.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventResource, State: sandbox.Running, Reason: "a process was killed: out of memory"})
			}
		}
	}
}

// keyLocks are locks by name, made when needed. The zero value is ready for use.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when the lock is free again
}

// lock waits for the lock of a name.
func (k *keyLocks) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		wait, taken := k.held[name]
		if !taken {
			free := make(chan struct{})
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			k.held[name] = free
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, name)
				k.mu.Unlock()
				close(free)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
