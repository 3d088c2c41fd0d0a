// Package daemon wires the parts of a node together, plainly, and serves them.
package daemon

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	_ "modernc.org/sqlite" // the driver of the node's database

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/network"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/worktree"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
	"github.com/atoll-run/atoll/tenant"
)

// Config is what a daemon is told by its command line and environment.
type Config struct {
	Home       Home
	Guest      string      // path of the guest agent, see the command that embeds it
	Sentry     string      // path of the executable of gVisor sandboxes; empty: our own, which then must be one
	Runtimes   []string    // in order of preference; empty: all that this host can run
	Prewarm    int         // kernels and network links that are made ahead of need
	Retention  chunk.Rules // how long snapshots are kept that users made and did not name
	VolumeSize int64       // bytes that each volume may hold; 0: the node's default
	Version    string
	Log        *slog.Logger

	// The rest is only used by Run.
	Addr   string         // to listen on, "127.0.0.1:7700"
	Domain string         // under which sandboxes are addressed; default: localhost with Addr's port
	TLS    bool           // serve TLS with a certificate of the home's own CA
	Pools  map[string]int // template to the number of sandboxes kept ready
	Ready  func(Endpoint) // called once it serves; may be nil
	Name   string         // by which other nodes know this one; default: the host's
	Uplink float64        // bytes per second that may be sent to other nodes; 0: no limit
	Site   string         // where this node is, "region/place", for what is fetched from the nearest; may be empty
	Store  string         // URL of an object store to push to and pull from; may be empty
	Kept   chunk.Rules    // how long it keeps what has no name
	Cache  Cache          // of chunks that are fetched
}

// Parts is a node with what it stands on.
type Parts struct {
	Node *node.Node
	Keys *tenant.Keys
	Home Home // of this node; below the configured one for a node without a daemon

	snapshots *snapshot.Store
	peers     native.Peering // empty until Run has opened it
	cache     *cache.Cache   // as above

	closers []io.Closer // in the order of opening
}

// defaults is what a sandbox gets when a request does not say: enough for a
// compiler or a notebook, little enough that a host holds many.
var defaults = sandbox.Resources{CPUs: 2, Memory: 1 << 30, Disk: 10 << 30, Pids: 1024}

// Open takes the state directory and opens everything in it. It fails with
// Conflict when another process has it.
func Open(ctx context.Context, cfg Config) (*Parts, error) {
	return open(ctx, cfg, cfg.Home, cfg.Prewarm)
}

// OpenTransient opens a node that lives as long as this process, for commands
// that run without a daemon. It shares the home's images and nothing else.
// What a killed predecessor left behind is removed first.
func OpenTransient(ctx context.Context, cfg Config) (*Parts, error) {
	sweepTransient(ctx, cfg)
	home := Home(cfg.Home.path("run", sandbox.NewID()))
	p, err := open(ctx, cfg, home, 0)
	if err != nil {
		_ = os.RemoveAll(string(home))
		return nil, err
	}
	return p, nil
}

// CloseTransient removes all sandboxes of a transient node and its directory.
func (p *Parts) CloseTransient(ctx context.Context) error {
	err := errors.Join(p.Node.Shutdown(ctx), p.closeAll())
	if err == nil { // else what is left is for the next sweep to find
		err = os.RemoveAll(string(p.Home))
	}
	return err
}

// sweepTransient removes transient nodes whose process is gone.
func sweepTransient(ctx context.Context, cfg Config) {
	dirs, err := os.ReadDir(cfg.Home.path("run"))
	if err != nil {
		return // none was ever made
	}
	for _, d := range dirs {
		home := Home(cfg.Home.path("run", d.Name()))
		p, err := open(ctx, cfg, home, 0)
		if sandbox.Is(err, sandbox.Conflict) {
			continue // its process lives
		}
		if err == nil {
			err = p.CloseTransient(ctx)
		}
		if err != nil {
			cfg.Log.Warn("removing what a killed command left", "dir", home, "error", err)
		}
	}
}

func open(ctx context.Context, cfg Config, home Home, prewarm int) (p *Parts, err error) {
	p = &Parts{Home: home}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.closeAll())
		}
	}()
	lock, err := home.lock()
	if err != nil {
		return p, err
	}
	p.closers = append(p.closers, lock)
	home.keepReserve(cfg.Log)
	db, err := openDB(home.path("node.db"))
	if err != nil {
		return p, err
	}
	p.closers = append(p.closers, db)
	if p.Keys, err = tenant.OpenKeys(ctx, db); err != nil {
		return p, err
	}
	images, err := image.Open(cfg.Home.Images(), image.Options{Log: cfg.Log})
	if err != nil {
		return p, err
	}
	snapshots, damaged, err := snapshot.Open(home.path("snapshots"))
	if err != nil {
		return p, err
	}
	for _, d := range damaged {
		cfg.Log.Error("a snapshot cannot be used", "error", d)
	}
	nw, networkErr := network.Open(network.Config{Prefix: home.prefix(), Dir: home.path("network"), Prewarm: prewarm, Log: cfg.Log})
	if nw != nil {
		p.closers = append(p.closers, nw)
	}
	p.snapshots = snapshots
	runtimes, failed := openRuntimes(ctx, cfg, home, prewarm)
	p.Node, err = node.Open(ctx, node.Config{
		Dir: string(home), DB: db, Runtimes: runtimes, RuntimeErrors: failed, Network: nw, NetworkError: networkErr,
		Images: images, Snapshots: snapshots, Defaults: defaults, Prewarm: prewarm, VolumeSize: cfg.VolumeSize, Retention: cfg.Retention, Version: cfg.Version, Log: cfg.Log,
	})
	return p, err
}

// openDB opens the node's database so that a commit that returned survives a
// power failure. We are alone with it, so SQLite needs no file for sharing
// memory, which it could not make on a full disk.
func openDB(path string) (*sql.DB, error) {
	const op = "daemon.openDB"
	// The driver sets those with names of their own after the others: the lock
	// must be there first.
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=locking_mode(EXCLUSIVE)&_journal_mode=WAL&_synchronous=FULL&_busy_timeout=5000")
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, path, err)
	}
	db.SetMaxOpenConns(1) // SQLite has one writer; waiting in Go is fair, waiting in SQLite is not
	if err := db.Ping(); err != nil {
		return nil, errors.Join(sandbox.E(op, sandbox.Internal, path, err), db.Close())
	}
	return db, os.Chmod(path, 0o600)
}

// openRuntimes opens what this host can run, in order of preference, and says
// why it cannot run the rest.
func openRuntimes(ctx context.Context, cfg Config, home Home, prewarm int) ([]sandbox.Runtime, map[string]error) {
	all := []struct {
		name string
		open func(dir string) (sandbox.Runtime, error)
	}{
		{"gvisor", func(dir string) (sandbox.Runtime, error) {
			return gvisor.New(gvisor.Config{Dir: dir, Guest: cfg.Guest, Executable: cfg.Sentry, Prefix: home.prefix(), Prewarm: prewarm, Log: cfg.Log})
		}},
		{"microvm", func(dir string) (sandbox.Runtime, error) {
			return microvm.New(ctx, microvm.Config{Dir: dir, Cache: cfg.Home.Machines(), Guest: cfg.Guest, Prefix: home.prefix() + "v", Prewarm: prewarm, Log: cfg.Log})
		}},
		{"worktree", func(dir string) (sandbox.Runtime, error) {
			return worktree.New(worktree.Config{Dir: dir, Guest: cfg.Guest, Prefix: home.prefix() + "w", Log: cfg.Log})
		}},
	}
	wanted := cfg.Runtimes
	if len(wanted) == 0 {
		for _, r := range all {
			wanted = append(wanted, r.name)
		}
	}
	var out []sandbox.Runtime
	failed := make(map[string]error)
	for _, name := range wanted {
		failed[name] = fmt.Errorf("there is no runtime of this name")
		for _, r := range all {
			if r.name != name {
				continue
			}
			rt, err := r.open(filepath.Join(string(home), "runtimes", name))
			if err != nil {
				failed[name] = err
				continue
			}
			delete(failed, name)
			out = append(out, rt)
		}
	}
	return out, failed
}

// Close closes the node, whose sandboxes go on, and everything below it.
func (p *Parts) Close(ctx context.Context) error {
	return errors.Join(p.Node.Close(ctx), p.closeAll())
}

// closeAll closes what the node stands on, last opened first.
func (p *Parts) closeAll() error {
	var errs []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		errs = append(errs, p.closers[i].Close())
	}
	p.closers = nil
	return errors.Join(errs...)
}
