package network

import (
	"context"
	"errors"
	"net/netip"

	"github.com/atoll-run/atoll/sandbox"
)

// Attach makes a sandbox's link under a policy. It fails with Invalid for a
// policy that makes no sense, Exists when id is attached, Exhausted when the
// pool is empty. A failed Attach leaves nothing.
func (n *Network) Attach(ctx context.Context, id string, policy sandbox.NetworkPolicy) (sandbox.Link, error) {
	const op = "network.Attach"
	if !sandbox.ValidID(id) {
		return sandbox.Link{}, sandbox.Errorf(op, sandbox.Invalid, id, "not a sandbox id")
	}
	rules, err := compile(policy, n.cfg.Pool)
	if err != nil {
		return sandbox.Link{}, sandbox.E(op, "", id, err)
	}
	if err := ctx.Err(); err != nil {
		return sandbox.Link{}, sandbox.E(op, "", id, err)
	}
	a := newAttachment()
	a.mu.Lock()
	defer a.mu.Unlock()
	n.mu.Lock()
	if n.byID[id] != nil {
		n.mu.Unlock()
		return sandbox.Link{}, sandbox.Errorf(op, sandbox.Exists, id, "already attached")
	}
	n.byID[id] = a
	n.mu.Unlock()
	if err := n.attach(a, id, policy, rules); err != nil {
		a.gone = true
		n.mu.Lock()
		delete(n.byID, id)
		n.mu.Unlock()
		return sandbox.Link{}, explain(op, id, err)
	}
	return a.Link, nil
}

// attach does the work of Attach. a.mu is held.
func (n *Network) attach(a *attachment, id string, policy sandbox.NetworkPolicy, rules *rules) (err error) {
	if err := n.openRoutes(policy); err != nil {
		return err
	}
	b, err := n.link()
	if err != nil {
		return err
	}
	a.block = b
	a.Attachment = Attachment{ID: id, Policy: policy, Link: sandbox.Link{
		NetNS: n.links.netns(b), Device: guestLink,
		Address: netip.PrefixFrom(b.address(), blockBits), Gateway: b.gateway()}}
	a.rules.Store(rules)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.firewall.remove(b), n.links.remove(b), n.records.remove(id))
		}
	}()
	if err := n.firewall.set(b, rules); err != nil {
		return err
	}
	if policy.RateLimit > 0 {
		if err := n.links.limit(b, policy.RateLimit); err != nil {
			return err
		}
	}
	if err := n.records.put(a.Attachment); err != nil {
		return err
	}
	n.mu.Lock()
	n.byAddr[b.address()] = a
	n.mu.Unlock()
	return nil
}

// link takes a prewarmed link or makes one.
func (n *Network) link() (block, error) {
	select {
	case b := <-n.ready: // nil without prewarming: never ready
		return b, nil
	default:
		return n.links.create(n.mtu())
	}
}

// Update replaces an attachment's policy at once: packets and open connections
// that it no longer allows are cut. It fails with NotFound for an unknown id; a
// failed Update leaves the old policy in force.
func (n *Network) Update(ctx context.Context, id string, policy sandbox.NetworkPolicy) error {
	const op = "network.Update"
	rules, err := compile(policy, n.cfg.Pool)
	if err != nil {
		return sandbox.E(op, "", id, err)
	}
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", id, err)
	}
	a, unlock, err := n.locked(op, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.openRoutes(policy); err != nil {
		return explain(op, id, err)
	}
	// The record first: after a crash in between, the new policy takes force.
	next := a.Attachment
	next.Policy = policy
	if err := n.records.put(next); err != nil {
		return explain(op, id, err)
	}
	if err := n.firewall.set(a.block, rules); err != nil {
		return explain(op, id, errors.Join(err, n.records.put(a.Attachment)))
	}
	if was := a.Policy.RateLimit; policy.RateLimit != was {
		if err := n.links.limit(a.block, policy.RateLimit); err != nil {
			err = errors.Join(err, n.links.limit(a.block, was), n.firewall.set(a.block, a.rules.Load()), n.records.put(a.Attachment))
			return explain(op, id, err)
		}
	}
	a.rules.Store(rules)
	n.mu.Lock()
	a.Policy = policy // the only part that changes; List reads it
	n.mu.Unlock()
	a.flows.cut(func(f *flow) bool { return !reachable(rules, f.name, f.addr) })
	if err := forget(denied{from: a.block.address(), carrier: n.address, rules: rules}); err != nil {
		n.log.Warn("connections that the new policy denies linger in the connection table until they time out", "id", id, "err", err)
	}
	return nil
}

// Detach removes a sandbox's link and all that belongs to it. It is idempotent.
func (n *Network) Detach(ctx context.Context, id string) error {
	const op = "network.Detach"
	if err := ctx.Err(); err != nil {
		return sandbox.E(op, "", id, err)
	}
	a, unlock, err := n.locked(op, id)
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	defer unlock()
	b := a.block
	a.flows.end()
	if err := errors.Join(n.firewall.remove(b), n.links.remove(b)); err != nil {
		return explain(op, id, err)
	}
	if err := forget(denied{from: b.address()}); err != nil {
		n.log.Warn("connections of a removed sandbox linger in the connection table until they time out", "id", id, "err", err)
	}
	if err := n.records.remove(id); err != nil { // last: while it exists, the rest is found again
		return explain(op, id, err)
	}
	a.gone = true
	n.mu.Lock()
	delete(n.byID, id)
	delete(n.byAddr, b.address())
	n.mu.Unlock()
	return nil
}

// locked returns the attachment with its lock held, or a NotFound error.
func (n *Network) locked(op, id string) (*attachment, func(), error) {
	n.mu.RLock()
	a := n.byID[id]
	n.mu.RUnlock()
	if a != nil {
		a.mu.Lock()
		if !a.gone {
			return a, a.mu.Unlock, nil
		}
		a.mu.Unlock()
	}
	return nil, nil, sandbox.Errorf(op, sandbox.NotFound, id, "not attached")
}
