package node

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// maxPool bounds how many sandboxes of one template wait to be claimed.
const maxPool = 256

// SetPool asks for size started sandboxes of a template to be kept ready.
func (n *Node) SetPool(ctx context.Context, template string, size int) error {
	const op = "node.SetPool"
	if size < 0 || size > maxPool {
		return sandbox.Errorf(op, sandbox.Invalid, template, "a pool has between 0 and %d sandboxes", maxPool)
	}
	t, err := n.GetTemplate(ctx, template)
	if err != nil {
		return err
	}
	if size == 0 {
		err = n.store.delete(ctx, kindPool, t.ID)
	} else {
		err = n.store.put(ctx, kindPool, t.ID, size)
	}
	if err != nil {
		return err
	}
	n.mu.Lock()
	if size == 0 {
		delete(n.pools, t.ID)
	} else {
		n.pools[t.ID] = size
	}
	n.mu.Unlock()
	nudge(n.poolKick)
	return nil
}

// poolKey names a pool: its sandboxes are alike.
type poolKey struct{ template, runtime string }

// pool is the key of the pool in which a sandbox waits.
func (s Sandbox) pool() poolKey { return poolKey{s.Pooled, s.Runtime} }

// Pools lists the pools by template and runtime: those that were asked for, and
// those for which there is demand.
func (n *Node) Pools() []Pool {
	var out []Pool
	for key, size := range n.poolSizes(time.Now()) {
		out = append(out, Pool{Template: key.template, Runtime: key.runtime, Size: size, Ready: len(n.pooled(key))})
	}
	slices.SortFunc(out, func(a, b Pool) int {
		return cmp.Or(cmp.Compare(a.Template, b.Template), cmp.Compare(a.Runtime, b.Runtime))
	})
	return out
}

const (
	// demandWindow is over how long claims count as demand, and demandKept for how
	// long one sandbox is kept after the last.
	demandWindow = 10 * time.Second
	demandKept   = 10 * time.Minute
)

// demandSize is how many sandboxes to keep for what was claimed at such times, the
// last one last: one, and one more for each claim of late, up to a bound.
func demandSize(claims []time.Time, now time.Time, bound int) int {
	if len(claims) == 0 || now.Sub(claims[len(claims)-1]) >= demandKept {
		return 0
	}
	size := 1
	for _, at := range claims {
		if now.Sub(at) < demandWindow {
			size++
		}
	}
	return min(size, bound)
}

// demanded notes that a sandbox was asked for that a pool could give. Only
// machines are made ahead without being told to: to start one takes long.
func (n *Node) demanded(req CreateRequest, rec Sandbox, from origin) {
	plain := !req.Fresh && len(rec.Spec.Mounts)+len(rec.Spec.Labels) == 0 && req.Network == "" && req.Resources == sandbox.Resources{}
	r, err := n.Runtime(rec.Runtime)
	if !plain || err != nil || n.cfg.Prewarm == 0 || r.Capabilities().Isolation != sandbox.IsolationMachine {
		return
	}
	key := poolKey{from.template.ID, rec.Runtime}
	n.mu.Lock()
	claims := append(n.demand[key], time.Now())
	n.demand[key] = claims[max(0, len(claims)-n.cfg.Prewarm):]
	n.mu.Unlock()
	nudge(n.poolKick)
}

// poolSizes is how many sandboxes are to wait in each pool.
func (n *Node) poolSizes(now time.Time) map[poolKey]int {
	n.mu.RLock()
	defer n.mu.RUnlock()
	sizes := make(map[poolKey]int)
	for template, size := range n.pools {
		sizes[poolKey{template, n.poolRuntime()}] = size
	}
	for key, claims := range n.demand {
		if size := demandSize(claims, now, n.cfg.Prewarm); size > 0 {
			sizes[key] = max(sizes[key], size)
		}
	}
	return sizes
}

// poolRuntime is the runtime of pools that name none: the most preferred that
// runs anything but repositories.
func (n *Node) poolRuntime() string {
	for _, r := range n.cfg.Runtimes {
		if slices.ContainsFunc(r.Capabilities().Roots, func(k sandbox.RootKind) bool { return k != sandbox.RootRepository }) {
			return r.Name()
		}
	}
	return n.cfg.Runtimes[0].Name()
}

// pooled returns the sandboxes that wait to be claimed, oldest first.
func (n *Node) pooled(key poolKey) []Sandbox {
	list := n.records(func(r Sandbox) bool { return r.pool() == key && r.State == sandbox.Running })
	slices.SortFunc(list, func(a, b Sandbox) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return list
}

// claim gives a waiting sandbox to a request that asks for nothing that the
// waiting one does not have. It reports false when there is none. The entry's
// op is held on return.
func (n *Node) claim(ctx context.Context, req CreateRequest, want Sandbox, from origin) (*entry, Sandbox, bool) {
	if req.Fresh || len(want.Spec.Mounts) > 0 || len(want.Spec.Labels) > 0 {
		return nil, Sandbox{}, false
	}
	for _, candidate := range n.pooled(poolKey{from.template.ID, want.Runtime}) {
		if !claimable(candidate, want) {
			continue
		}
		e, err := n.find("node.claim", candidate.ID)
		if err != nil || !e.op.tryLock() {
			continue // somebody else is claiming it
		}
		sb, err := n.claimOne(ctx, e, want)
		nudge(n.poolKick)
		if err == nil {
			return e, sb, true
		}
		e.op.unlock()
		n.log.Warn("claiming from a pool", "sandbox", candidate.ID, "error", err)
	}
	return nil, Sandbox{}, false
}

// claimable reports whether a waiting sandbox can become what is wanted.
func claimable(have, want Sandbox) bool {
	return have.Build == want.Build && have.Spec.Root == want.Spec.Root && have.Spec.Network == want.Spec.Network &&
		have.Spec.Resources == want.Spec.Resources
}

// claimOne makes a waiting sandbox the wanted one. e.op is held. If it fails
// the sandbox is removed, since it may be half changed.
func (n *Node) claimOne(ctx context.Context, e *entry, want Sandbox) (Sandbox, error) {
	have := n.record(e)
	if have.Pooled == "" || have.State != sandbox.Running {
		return Sandbox{}, sandbox.Errorf("node.claim", sandbox.Conflict, have.ID, "it is taken")
	}
	rec := want
	rec.ID, rec.Runtime, rec.Parent, rec.Spec, rec.State = have.ID, have.Runtime, have.Parent, have.Spec, sandbox.Running
	if err := n.takeName(e, &rec); err != nil {
		return Sandbox{}, err
	}
	rec.Spec.Hostname = cmp.Or(want.Spec.Hostname, rec.Name)
	err := n.initGuest(ctx, rec, have.GuestToken)
	if err == nil && rec.Spec.Link != nil && !samePolicy(rec.Policy, have.Policy) {
		err = n.cfg.Network.Update(ctx, rec.ID, rec.Policy)
	}
	if err == nil {
		err = n.openPorts(e, &rec)
	}
	if err == nil {
		err = n.save(ctx, e, rec)
	}
	n.mu.Lock()
	if e.client != nil { // it shows the token of before
		e.client.CloseIdle()
		e.client = nil
	}
	n.mu.Unlock()
	if err != nil {
		n.discard(e)
		return Sandbox{}, err
	}
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventState, State: rec.State, Reason: "claimed from the pool"})
	return rec, nil
}

// takeName moves an entry to the record's name, choosing one if it has none.
func (n *Node) takeName(e *entry, rec *Sandbox) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	taken := func(name string) bool { _, ok := n.names[name]; return ok }
	if rec.Name == "" {
		rec.Name = newName(taken)
	} else if taken(rec.Name) {
		return sandbox.Errorf("node.Create", sandbox.Exists, rec.Name, "the name is in use")
	}
	delete(n.names, e.rec.Name)
	n.names[rec.Name] = rec.ID
	e.rec.Name = rec.Name
	return nil
}

func samePolicy(a, b sandbox.NetworkPolicy) bool {
	return a.Internet == b.Internet && a.RateLimit == b.RateLimit && slices.Equal(a.AllowOut, b.AllowOut) && slices.Equal(a.DenyOut, b.DenyOut)
}

// poolLoop keeps the pools at their sizes.
func (n *Node) poolLoop(ctx context.Context) {
	defer n.done.Done()
	const (
		look     = time.Minute
		maxPause = time.Minute // between tries while filling fails
	)
	pause := time.Second
	for {
		wait := look
		if err := n.fillPools(ctx); err != nil {
			n.log.Error("filling a pool", "error", err)
			wait, pause = pause, min(2*pause, maxPause)
		} else {
			pause = time.Second
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-n.poolKick:
			timer.Stop()
			n.awaitLull(ctx)
		}
	}
}

// awaitLull returns when nothing was claimed for a moment, so that filling does
// not take the processor from those who claim; at the latest after a while, so
// that steady demand cannot keep the pools empty.
func (n *Node) awaitLull(ctx context.Context) {
	const lull, patience = 300 * time.Millisecond, 3 * time.Second
	end := time.NewTimer(patience)
	defer end.Stop()
	for {
		quiet := time.NewTimer(lull)
		select {
		case <-ctx.Done():
			quiet.Stop()
			return
		case <-end.C:
			quiet.Stop()
			return
		case <-quiet.C:
			return
		case <-n.poolKick:
			quiet.Stop()
		}
	}
}

// fillPools makes one sandbox at a time, so that filling disturbs work little,
// and removes those that wait for nothing any more.
func (n *Node) fillPools(ctx context.Context) error {
	sizes := n.poolSizes(time.Now())
	for _, r := range n.records(func(r Sandbox) bool { return r.Pooled != "" && r.State == sandbox.Running }) {
		t, err := n.GetTemplate(ctx, r.Pooled)
		current := err == nil && len(t.Builds) > 0 && r.Build == t.ready("").ID
		if current && len(n.pooled(r.pool())) <= sizes[r.pool()] {
			continue
		}
		if err := n.Remove(ctx, r.ID); err != nil && !sandbox.Is(err, sandbox.NotFound) {
			return err
		}
	}
	for key := range sizes {
		// Looked at anew for each: demand may have ceased, or Shutdown begun.
		for ctx.Err() == nil && len(n.pooled(key)) < n.poolSizes(time.Now())[key] {
			if err := n.fillOne(ctx, key); err != nil {
				return err
			}
		}
	}
	return nil
}

func (n *Node) fillOne(ctx context.Context, key poolKey) error {
	from, err := n.resolve(ctx, key.template)
	if err != nil {
		return err
	}
	req := CreateRequest{Image: key.template, Runtimes: []string{key.runtime}}
	rec, err := n.draft(req, from)
	if err != nil {
		return err
	}
	rec.Pooled = key.template
	snap := ""
	if n.fits(rec, from) {
		snap = from.build.Snapshot
	}
	if rec.Runtime, err = n.choose("node.pool", req, rec, snap); err != nil {
		return err
	}
	sb, err := n.launch(ctx, rec, source{snap: snap})
	if err != nil {
		return err
	}
	// The first process of a machine costs several times what later ones do;
	// better it costs us than whoever claims it.
	if g, err := n.Guest(ctx, sb.ID); err == nil {
		g.WarmUp(ctx)
	}
	return nil
}
