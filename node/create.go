package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// maxEnv is the longest environment variable that Linux passes to a process, in
// bytes (MAX_ARG_STRLEN less the '=' and the NUL).
const maxEnv = 128<<10 - 2

// guestTimeout bounds one short call to a guest, such as /init.
const guestTimeout = 10 * time.Second

// Create makes a sandbox and returns once its guest answers and knows its
// environment. On an error nothing is left of it.
func (n *Node) Create(ctx context.Context, req CreateRequest) (Sandbox, error) {
	e, sb, err := n.create(ctx, req, nil)
	if err == nil {
		e.op.unlock()
	}
	return sb, err
}

// create makes a sandbox, for a main command if run is not nil. The entry's op
// is held on return.
func (n *Node) create(ctx context.Context, req CreateRequest, run *RunRequest) (*entry, Sandbox, error) {
	const op = "node.Create"
	if err := n.anyOf(req.Runtimes); err != nil { // before an image is made for it
		return nil, Sandbox{}, err
	}
	from, err := n.resolve(ctx, req.Image)
	if err != nil {
		return nil, Sandbox{}, err
	}
	if err := checkMemory(op, req.Resources.Memory); err != nil {
		return nil, Sandbox{}, err
	}
	rec, err := n.draft(req, from)
	if err == nil && run != nil && !rec.Spec.HasAgent() {
		err = sandbox.Errorf(op, sandbox.Unsupported, req.Image, "without the guest agent nothing can be run in it").WithHint("use `atoll create`, or leave out --no-agent")
	}
	if err == nil && run != nil {
		rec.Main, err = run.main(rec)
	}
	if err != nil {
		return nil, Sandbox{}, err
	}
	snap := ""
	if !req.Fresh && n.fits(rec, from) {
		snap = from.build.Snapshot
	}
	if rec.Runtime, err = n.choose(op, req, rec, snap); err != nil {
		return nil, Sandbox{}, err
	}
	if from.template != nil {
		n.used(ctx, from.template.ID)
		n.demanded(req, rec, from)
		if e, sb, ok := n.claim(ctx, req, rec, from); ok {
			return n.checkWorkdir(ctx, req, e, sb)
		}
	}
	e, sb, err := n.bringUp(ctx, rec, source{snap: snap})
	if err != nil {
		return nil, Sandbox{}, err
	}
	return n.checkWorkdir(ctx, req, e, sb)
}

// draft is the record that a request means, before anything exists.
func (n *Node) draft(req CreateRequest, from origin) (Sandbox, error) {
	const op = "node.Create"
	now := time.Now().UTC()
	rec := Sandbox{
		ID: sandbox.NewID(), Name: req.Name, Team: cmp.Or(req.Team, defaultTeam), State: sandbox.Creating,
		Image: req.Image, Env: merged(from.env, req.Env), User: cmp.Or(req.User, from.user),
		Workdir: cmp.Or(req.Workdir, from.workdir), Command: from.command,
		Metadata: maps.Clone(req.Metadata), Ports: slices.Clone(req.Ports), Volumes: slices.Clone(req.Volumes),
		Policy: sandbox.NetworkPolicy{Internet: true}, PublicTraffic: !req.PrivateAccess,
		CreatedAt: now, StartedAt: now, Lifecycle: req.Lifecycle,
	}
	if from.template != nil {
		rec.Template, rec.Build = from.template.ID, from.build.ID
	}
	if req.Policy != nil {
		rec.Policy = *req.Policy
	}
	rec.Lifecycle.Timeout = req.Timeout
	rec.Lifecycle.AutoResume = rec.Lifecycle.AutoResume || rec.Lifecycle.Idle > 0
	rec.EndAt = deadline(now, req.Timeout)
	if req.Secure {
		rec.GuestToken = newToken()
	}
	if req.PrivateAccess {
		rec.TrafficToken = newToken()
	}
	rec.Spec = sandbox.Spec{
		ID: rec.ID, Root: from.root, Hostname: req.Hostname, Network: req.Network, Labels: maps.Clone(req.Labels),
		Resources: req.Resources.Or(from.resources).Or(n.cfg.Defaults), Mounts: slices.Clone(req.Mounts), Boot: req.Boot,
	}
	if err := n.addVolumes(&rec); err != nil {
		return Sandbox{}, err
	}
	if rec.Spec.Network == "" {
		rec.Spec.Network = sandbox.NetworkSandbox
		if n.cfg.Network == nil {
			rec.Spec.Network = sandbox.NetworkNone
		}
	}
	return rec, checkRequest(op, rec)
}

// anyOf fails with the reason of the first when the node has none of these runtimes, though some are named.
func (n *Node) anyOf(names []string) (why error) {
	for _, name := range names {
		_, err := n.Runtime(name)
		if err == nil {
			return nil
		}
		if why == nil {
			why = err
		}
	}
	return why
}

// choose picks the first runtime, in the order asked for, that can do what the
// record needs.
func (n *Node) choose(op string, req CreateRequest, rec Sandbox, snap string) (string, error) {
	if snap != "" {
		m, err := n.cfg.Snapshots.Usable(snap)
		return m.Runtime, err
	}
	order := req.Runtimes
	if len(order) == 0 {
		for _, r := range n.cfg.Runtimes {
			order = append(order, r.Name())
		}
	}
	spec := rec.Spec
	if spec.Network == sandbox.NetworkSandbox {
		spec.Link = &sandbox.Link{} // made once it is known that some runtime wants it
	}
	var why error
	for _, name := range order {
		r, err := n.Runtime(name)
		if err == nil {
			err = fitting(op, name, rec.Image, r.Capabilities(), spec)
		}
		if err == nil && rec.Lifecycle.Idle > 0 && !(canRest(r.Capabilities()) && spec.HasAgent()) {
			err = sandbox.Errorf(op, sandbox.Unsupported, rec.Image, "runtime %s cannot pause sandboxes that are idle", name)
		}
		if err == nil {
			return name, nil
		}
		if why == nil { // the most preferred one's reason is what the user wants to know
			why = err
		}
	}
	return "", named(why, rec.ID, cmp.Or(rec.Name, rec.Image))
}

// source is what a machine is made from.
type source struct {
	snap string    // a snapshot; empty: its root
	live *Incoming // what comes beside the snapshot; nil: nothing
}

// launch makes the sandbox of a drafted record.
func (n *Node) launch(ctx context.Context, rec Sandbox, from source) (Sandbox, error) {
	e, sb, err := n.bringUp(ctx, rec, from)
	if err == nil {
		n.followMain(e) // a child's, which its parent's snapshot holds
		e.op.unlock()
	}
	return sb, err
}

// bringUp is launch with the entry's op held on return.
func (n *Node) bringUp(ctx context.Context, rec Sandbox, from source) (*entry, Sandbox, error) {
	e, err := n.reserve(&rec)
	if err != nil {
		return nil, Sandbox{}, err
	}
	if from.live != nil {
		n.mu.Lock()
		e.before = from.live.before
		n.mu.Unlock()
	}
	err = n.start(ctx, e, &rec, from)
	if err == nil {
		rec.State, rec.Moving = sandbox.Running, ""
		err = n.save(ctx, e, rec)
	}
	if err != nil {
		n.discard(e)
		e.op.unlock()
		return nil, Sandbox{}, named(err, rec.ID, rec.Name)
	}
	return e, rec, nil
}

// reserve takes the record's name, choosing one if it has none. Nothing is
// written yet: should the process die, what it made is found to have no record
// and is removed, and a write costs as much time as a claim from a pool. The
// entry's op is held on return.
func (n *Node) reserve(rec *Sandbox) (*entry, error) {
	n.mu.Lock()
	taken := func(name string) bool { _, ok := n.names[name]; return ok }
	if rec.Name == "" {
		rec.Name = newName(taken)
	} else if taken(rec.Name) {
		n.mu.Unlock()
		return nil, sandbox.Errorf("node.Create", sandbox.Exists, rec.Name, "the name is in use").
			WithHint("choose another, or remove it with `atoll rm -f " + rec.Name + "`")
	}
	if rec.Spec.Hostname == "" {
		rec.Spec.Hostname = rec.Name
	}
	e := newEntry(*rec)
	e.op <- struct{}{}
	if was := n.entries[rec.ID]; was != nil { // it comes back: whoever is connected to its ports stays so
		e.listeners, was.listeners = was.listeners, nil
		was.closeLocal()
	}
	n.entries[rec.ID] = e
	n.names[rec.Name] = rec.ID
	n.mu.Unlock()
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventState, State: rec.State})
	return e, nil
}

// start attaches the network, makes the machine, tells its guest who it is and
// opens its ports. What it made is for the caller to remove when it fails.
func (n *Node) start(ctx context.Context, e *entry, rec *Sandbox, from source) error {
	if rec.Spec.Network == sandbox.NetworkSandbox {
		if n.cfg.Network == nil {
			return sandbox.E("node.start", sandbox.Unsupported, rec.Name, n.cfg.NetworkError)
		}
		link, err := n.cfg.Network.Attach(ctx, rec.ID, rec.Policy)
		if err != nil {
			return err
		}
		rec.Spec.Link = &link
	}
	r, err := n.Runtime(rec.Runtime)
	if err != nil {
		return err
	}
	if err := n.cfg.Images.VerifyRoot(rec.Spec.Root); err != nil {
		return err
	}
	oldToken, err := n.makeMachine(ctx, r, rec.Spec, from)
	if err != nil {
		return err
	}
	if rec.Spec.HasAgent() {
		if err := n.initGuest(ctx, *rec, oldToken); err != nil {
			return err
		}
	}
	return n.openPorts(e, rec)
}

// makeMachine makes a sandbox's machine. It returns the token that the guest knows already.
func (n *Node) makeMachine(ctx context.Context, r sandbox.Runtime, spec sandbox.Spec, from source) (token string, err error) {
	if from.snap == "" {
		return "", r.Create(ctx, spec)
	}
	m, err := n.GetSnapshot(ctx, from.snap)
	if err == nil {
		err = n.cfg.Snapshots.Verify(from.snap, r.Capabilities().Checks...) // a machine with a flipped bit runs, and does wrong
	}
	switch {
	case err != nil:
		return "", err
	case from.live != nil:
		return from.live.token, r.Receive(ctx, spec, n.cfg.Snapshots.Dir(from.snap), from.live.State, func(run func() error) error {
			return from.live.Start(func() error {
				n.arrived(spec.ID)
				return run()
			})
		})
	case m.filesOnly(r.Capabilities()):
		return "", r.Create(ctx, spec)
	}
	return m.Source.GuestToken, r.Restore(ctx, spec, n.cfg.Snapshots.Dir(from.snap))
}

// initGuest tells the guest its name, environment, token and the time, and
// gives it fresh entropy: siblings of a fork would else draw the same numbers.
func (n *Node) initGuest(ctx context.Context, rec Sandbox, oldToken string) error {
	ctx, stop := context.WithTimeout(ctx, guestTimeout)
	defer stop()
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy) // never fails since Go 1.24
	client := guest.New(n.dialGuest(rec), guest.Options{Token: oldToken})
	defer client.CloseIdle()
	if rec.Spec.Root.Kind == sandbox.RootRepository {
		// The runtime has told the guest things of its own, such as a working
		// tree's block of ports; /init replaces the environment.
		own, err := client.Envs(ctx)
		if err != nil {
			return err
		}
		rec.Env = merged(own, rec.Env)
	}
	now, user := time.Now(), cmp.Or(rec.User, "root")
	init := wire.Init{EnvVars: environment(rec), DefaultUser: &user, DefaultWorkdir: &rec.Workdir, Hostname: rec.Spec.Hostname, Timestamp: &now, Entropy: entropy,
		Continues: rec.Moving != ""}
	if rec.GuestToken != "" || oldToken != "" {
		init.AccessToken = &rec.GuestToken
	}
	return client.Init(ctx, init)
}

// environment is what every process of the sandbox gets. Programs tell by the
// names of E2B's variables that they are in a sandbox, and in which.
func environment(rec Sandbox) map[string]string {
	env := map[string]string{"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": rec.ID}
	if rec.Template != "" {
		env["E2B_TEMPLATE_ID"] = rec.Template
	}
	return merged(env, rec.Env)
}

// discard removes everything of a sandbox that was not finished. The entry's op
// is held.
func (n *Node) discard(e *entry) {
	// The caller's context may be why it failed; removal has its own.
	ctx, stop := context.WithTimeout(context.Background(), removeTimeout)
	defer stop()
	rec := n.record(e)
	if err := n.demolish(ctx, rec); err != nil {
		// The record stays, so that reconciling tries again.
		n.log.Error("removing an unfinished sandbox", "sandbox", rec.ID, "error", err)
		return
	}
	if err := n.store.delete(ctx, kindSandbox, rec.ID); err != nil {
		n.log.Error("removing an unfinished sandbox's record", "sandbox", rec.ID, "error", err)
		return
	}
	n.forget(e)
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventState, State: sandbox.Terminated, Reason: "not created"})
}

// forget drops an entry from memory.
func (n *Node) forget(e *entry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e.closeLocal()
	delete(n.entries, e.rec.ID)
	if n.names[e.rec.Name] == e.rec.ID {
		delete(n.names, e.rec.Name)
	}
}

// merged is base overlaid by over; nil when both are empty.
func merged(base, over map[string]string) map[string]string {
	if len(base) == 0 {
		return maps.Clone(over)
	}
	out := maps.Clone(base)
	maps.Copy(out, over)
	return out
}

// deadline is now + d; nil when d is zero.
func deadline(now time.Time, d time.Duration) *time.Time {
	if d <= 0 {
		return nil
	}
	t := now.Add(d)
	return &t
}

// newToken returns 128 random bits in hexadecimal.
func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}
