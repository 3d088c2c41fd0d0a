// Package node turns recorded intent into running sandboxes on this host.
//
// Intent is a record in the node's database. An operation that makes something
// writes its record when it is made; one that takes something away first writes
// that it will. So whatever moment the process dies at, reconciling on the next
// start (see plan) finds for each sandbox either the old state or the new one,
// and removes the rest.
//
// Locks: an entry's op serialises the operations on one sandbox and may be held
// for long; Node.mu guards the maps and the records in them and is only held
// for moments. op is taken before mu.
package node

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/network"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// Config is what a node stands on. It owns none of it but uses it alone.
type Config struct {
	Dir           string            // volumes and build contexts lie below it
	DB            *sql.DB           // records
	Runtimes      []sandbox.Runtime // in order of preference, at least one
	RuntimeErrors map[string]error  // runtimes that this host cannot have, and why; may be nil
	Network       *network.Network  // nil: this host gives sandboxes no network of their own
	NetworkError  error             // why Network is nil
	Images        *image.Store
	Snapshots     *snapshot.Store
	Defaults      sandbox.Resources // for what a request leaves out
	Retention     chunk.Rules       // for snapshots that nobody named
	Prewarm       int               // machines of each template that demand may have made ahead; 0: none
	VolumeSize    int64             // bytes that each volume may hold; 0: 10 GiB
	Version       string
	Log           *slog.Logger
}

// Node is one host's sandboxes. Its methods may be called from many goroutines.
type Node struct {
	cfg      Config
	store    *store
	hub      *hub
	runtimes map[string]sandbox.Runtime
	log      *slog.Logger

	mu         sync.RWMutex
	entries    map[string]*entry    // by sandbox ID
	names      map[string]string    // live sandboxes' names to IDs
	templates  map[string]*Template // by ID; values are replaced, never changed
	volumes    map[string]Volume    // by ID
	volumeUses map[string]volumeUse // by volume ID
	pools      map[string]int       // template ID to the size wanted
	builds     map[string]*buildLog // by build ID, since this node started
	forward    Forward              // to sandboxes that moved; nil: there is no way
	// demand is when sandboxes of a kind were asked for, the last Prewarm times.
	demand map[poolKey][]time.Time

	base       sync.Mutex      // held while the base image is made
	updating   sync.Mutex      // held while a template is updated
	kick       chan struct{}   // asks the reconcile loop to look again; holds one
	poolKick   chan struct{}   // asks the pool keeper to look again; holds one
	background context.Context // ends when the node is closed
	stop       context.CancelFunc
	done       sync.WaitGroup // the background loops and builds
}

// entry is one sandbox and what this process holds for it.
type entry struct {
	op gate // the operation under way

	// The rest is guarded by Node.mu.
	rec       Sandbox
	listeners map[int]*listener // by guest port
	client    *guest.Client     // nil until first used
	samples   []sandbox.Stats   // oldest first, at most samplesKept
	watch     *mainWatch        // of the main command; nil when nobody watches
	usage     usage
	foreign   bool    // its agent knows no lasting connections
	before    Sandbox // where it is while it arrives; its Moved is empty when that is not known
}

func newEntry(r Sandbox) *entry {
	return &entry{op: newGate(), rec: r, listeners: make(map[int]*listener)}
}

const (
	reconcileEvery = 30 * time.Second
	sampleEvery    = 5 * time.Second
	samplesKept    = 720 // an hour
)

// Open loads the records, reconciles them with what the runtimes hold, and
// starts looking after them.
func Open(ctx context.Context, cfg Config) (*Node, error) {
	const op = "node.Open"
	if len(cfg.Runtimes) == 0 {
		err := sandbox.Errorf(op, sandbox.Unsupported, "", "this host can run no kind of sandbox")
		for name, cause := range cfg.RuntimeErrors {
			err = sandbox.Errorf(op, sandbox.Unsupported, name, "%w", cause)
			err.Hint = sandbox.HintOf(cause)
		}
		return nil, err
	}
	st, err := openStore(ctx, cfg.DB)
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, store: st, hub: newHub(), log: cfg.Log,
		runtimes:   make(map[string]sandbox.Runtime),
		entries:    make(map[string]*entry),
		names:      make(map[string]string),
		templates:  make(map[string]*Template),
		volumes:    make(map[string]Volume),
		volumeUses: make(map[string]volumeUse),
		pools:      make(map[string]int),
		demand:     make(map[poolKey][]time.Time),
		builds:     make(map[string]*buildLog),
		kick:       make(chan struct{}, 1),
		poolKick:   make(chan struct{}, 1),
	}
	n.cfg.VolumeSize = cmp.Or(cfg.VolumeSize, defaultVolumeSize)
	for _, r := range cfg.Runtimes {
		n.runtimes[r.Name()] = r
	}
	if err := n.loadAll(ctx); err != nil {
		return nil, err
	}
	n.background, n.stop = context.WithCancel(context.WithoutCancel(ctx))
	n.reconcile(ctx)
	n.sweepInternal()
	n.sweepAbandoned()
	n.sweepNetwork()
	n.sweepSnapshots()
	n.adoptMoved()

	n.done.Add(4 + len(cfg.Runtimes))
	go n.reconcileLoop(n.background)
	go n.sampleLoop(n.background)
	go n.poolLoop(n.background)
	go n.volumeLoop(n.background)
	for _, r := range cfg.Runtimes {
		go n.watchLoop(n.background, r)
	}
	return n, nil
}

func (n *Node) loadAll(ctx context.Context) error {
	if err := load(ctx, n.store, kindSandbox, func(id string, r Sandbox) {
		n.entries[id] = newEntry(r)
		if live(r.State) {
			n.names[r.Name] = id
		}
	}); err != nil {
		return err
	}
	if err := load(ctx, n.store, kindTemplate, func(id string, t Template) { n.templates[id] = interrupted(t) }); err != nil {
		return err
	}
	if err := load(ctx, n.store, kindVolume, func(id string, v Volume) { n.volumes[id] = v }); err != nil {
		return err
	}
	return load(ctx, n.store, kindPool, func(id string, size int) { n.pools[id] = size })
}

// Close stops looking after the sandboxes; they go on, and the next node on the
// same state finds them. Ports on the host are closed meanwhile. What was made
// ahead of demand, of which the next node will know nothing, is removed.
func (n *Node) Close(ctx context.Context) error {
	n.stop()
	n.done.Wait()
	n.mu.Lock()
	clear(n.demand)
	n.mu.Unlock()
	sizes := n.poolSizes(time.Now())
	var errs []error
	for _, r := range n.records(func(r Sandbox) bool { return r.Pooled != "" && live(r.State) && sizes[r.pool()] == 0 }) {
		if err := n.Remove(ctx, r.ID); !sandbox.Is(err, sandbox.NotFound) {
			errs = append(errs, err)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, e := range n.entries {
		e.closeLocal()
	}
	for _, r := range n.runtimes {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}

// Shutdown removes every sandbox and then closes the node.
func (n *Node) Shutdown(ctx context.Context) error {
	n.mu.Lock()
	clear(n.pools) // or the pool keeper would make new ones
	clear(n.demand)
	var ids []string
	for id, e := range n.entries {
		if live(e.rec.State) {
			ids = append(ids, id)
		}
	}
	n.mu.Unlock()
	err := each(ids, func(id string) error {
		if err := n.Remove(ctx, id); err != nil && !sandbox.Is(err, sandbox.NotFound) {
			return err
		}
		return nil
	})
	return errors.Join(err, n.Close(ctx))
}

// each calls fn for all items, a few at a time, and joins the errors.
func each[T any](items []T, fn func(T) error) error {
	const atOnce = 8
	var (
		wg    sync.WaitGroup
		slots = make(chan struct{}, atOnce)
		errs  = make([]error, len(items))
	)
	for i, item := range items {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			errs[i] = fn(item)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// live reports whether a sandbox in this state still holds its name.
func live(s sandbox.State) bool { return s != sandbox.Terminated }

// closeLocal releases what this process holds for the sandbox. Node.mu is held.
func (e *entry) closeLocal() {
	for port, l := range e.listeners {
		l.close()
		delete(e.listeners, port)
	}
	e.hangUp()
}

// hangUp ends this process's own connections to the sandbox. Node.mu is held.
func (e *entry) hangUp() {
	if e.client != nil {
		e.client.CloseIdle()
		e.client = nil
	}
	if e.watch != nil {
		e.watch.stop()
		e.watch = nil
	}
}

// nudge asks the reconcile loop to look again soon; it never waits.
func nudge(kick chan struct{}) {
	select {
	case kick <- struct{}{}:
	default:
	}
}

// gate is a mutex that can be waited for with a context.
type gate chan struct{}

func newGate() gate { return make(gate, 1) }

func (g gate) lock(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	default:
	}
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g gate) tryLock() bool {
	select {
	case g <- struct{}{}:
		return true
	default:
		return false
	}
}

func (g gate) unlock() { <-g }

// save writes a record to disk, then makes it what others see, and says so when
// the state changed.
func (n *Node) save(ctx context.Context, e *entry, rec Sandbox) error {
	if err := n.store.put(ctx, kindSandbox, rec.ID, rec); err != nil {
		return err
	}
	n.mu.Lock()
	before := e.rec.State
	e.rec = rec
	if before != rec.State {
		e.usage.looked = time.Time{}
	}
	if !live(rec.State) {
		delete(n.names, rec.Name)
	}
	n.mu.Unlock()
	if before != rec.State {
		n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventState, State: rec.State, Reason: rec.Reason})
	}
	nudge(n.kick) // a deadline may have moved
	return nil
}

// emit publishes and logs an event.
func (n *Node) emit(e sandbox.Event) {
	e = n.hub.publish(e)
	level := slog.LevelInfo
	if e.State == sandbox.Error || e.Kind != sandbox.EventState && e.Kind != sandbox.EventMain {
		level = slog.LevelWarn
	}
	n.log.Log(context.Background(), level, "sandbox event", "seq", e.Seq, "sandbox", e.Sandbox, "kind", e.Kind, "state", e.State, "reason", e.Reason)
}

// Info describes the node.
type Info struct {
	Version      string `json:"version"`
	Dir          string `json:"dir"`
	CPUs         int    `json:"cpus"`
	Sandboxes    int    `json:"sandboxes"` // live ones
	LastEvent    uint64 `json:"lastEvent"` // Seq of the newest event
	NetworkError string `json:"networkError,omitempty"`
}

// Info returns what the node is and how much it holds.
func (n *Node) Info() Info {
	n.mu.RLock()
	defer n.mu.RUnlock()
	i := Info{Version: n.cfg.Version, Dir: n.cfg.Dir, CPUs: runtime.NumCPU(), LastEvent: n.hub.last()}
	for _, e := range n.entries {
		if live(e.rec.State) && !e.rec.hidden() {
			i.Sandboxes++
		}
	}
	if n.cfg.NetworkError != nil {
		i.NetworkError = n.cfg.NetworkError.Error()
	}
	return i
}

// RuntimeInfo is one runtime as a node offers it, or why it does not.
type RuntimeInfo struct {
	Name         string               `json:"name"`
	Default      bool                 `json:"default"`
	Capabilities sandbox.Capabilities `json:"capabilities"`
	Err          string               `json:"error,omitempty"` // not usable on this host, and why
}

// Runtimes lists the runtimes in order of preference, those that this host
// cannot have last.
func (n *Node) Runtimes() []RuntimeInfo {
	var out []RuntimeInfo
	for i, r := range n.cfg.Runtimes {
		out = append(out, RuntimeInfo{Name: r.Name(), Default: i == 0, Capabilities: r.Capabilities()})
	}
	var missing []RuntimeInfo
	for name, err := range n.cfg.RuntimeErrors {
		missing = append(missing, RuntimeInfo{Name: name, Err: err.Error()})
	}
	slices.SortFunc(missing, func(a, b RuntimeInfo) int { return cmp.Compare(a.Name, b.Name) })
	return append(out, missing...)
}

// Runtime returns a runtime by name.
func (n *Node) Runtime(name string) (sandbox.Runtime, error) {
	if r, ok := n.runtimes[name]; ok {
		return r, nil
	}
	if err, ok := n.cfg.RuntimeErrors[name]; ok {
		return nil, sandbox.E("node.Runtime", sandbox.Unsupported, name, err)
	}
	return nil, sandbox.Errorf("node.Runtime", sandbox.Invalid, name, "no such runtime").WithHint("see `atoll runtime ls`")
}

// Images is the node's image store.
func (n *Node) Images() *image.Store { return n.cfg.Images }
