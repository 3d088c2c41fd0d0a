// Package network gives each sandbox a network of its own and enforces what it
// may reach.
//
// A sandbox's Link is a network namespace joined to the host by a pair of
// devices, with a /30 that no other sandbox on the host has. One nftables table
// per node decides by address; names are decided by a resolver and a
// transparent web proxy inside this process, to which the table diverts. The
// table lives in the kernel: when this process is dead, names no longer resolve
// and web traffic that would be judged by name is refused, while all else goes
// on under the same rules.
//
// IPv6 is off: sandboxes have no IPv6 address, IPv6 packets are dropped and AAAA
// questions get empty answers.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// DefaultPool is half of the range kept for benchmarks: never routed on the
// internet and used by hardly anyone. 100.64.0.0/10 would collide with overlay
// networks that drop its addresses from other devices.
var DefaultPool = netip.MustParsePrefix("198.19.0.0/16")

const (
	minPoolBits = 8
	maxPoolBits = 26
	defaultMTU  = 1500 // bytes
	maxPrewarm  = 256
	tendEvery   = 2 * time.Second
)

var prefixPattern = regexp.MustCompile(`^[a-z0-9]{1,12}$`)

// Config says where and how a node's networks are made. Dir and Prefix are
// required.
type Config struct {
	Dir      string           // this package's own directory: small files that describe what exists
	Prefix   string           // marks all that is made in the kernel; ^[a-z0-9]{1,12}$, one per state directory
	Pool     netip.Prefix     // IPv4, /8 to /26; each sandbox takes a /30. Default: DefaultPool
	Upstream []netip.AddrPort // resolvers; default: the host's, as they are at the time of asking
	Prewarm  int              // links made before they are asked for, at most 256
	Log      *slog.Logger     // default: discards
}

// Network holds the attachments of one node. Its methods may be called from many
// goroutines. Every error is a *sandbox.Err.
type Network struct {
	cfg      Config
	log      *slog.Logger
	lock     *os.File // held while this process serves Dir
	records  records
	links    *links
	firewall *firewall
	forward  *forwarding
	resolver *resolver
	service  *service
	ready    chan block // prewarmed links; nil without
	stop     context.CancelFunc
	running  sync.WaitGroup

	mu     sync.RWMutex
	byID   map[string]*attachment
	byAddr map[netip.Addr]*attachment
}

// Open starts serving the networks under cfg.Dir. Attachments that an earlier
// process left are adopted: they go on working, see List. What it left half made
// is removed. Open fails with Denied where this process may not make networks,
// with Conflict while another process serves the same directory.
func Open(cfg Config) (*Network, error) {
	const op = "network.Open"
	if err := cfg.complete(); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "attachments"), 0o700); err != nil {
		return nil, sandbox.E(op, "", "", err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, sandbox.E(op, "", cfg.Dir, err)
	}
	n := &Network{
		cfg: cfg, log: cfg.Log, lock: lock,
		records:  records{filepath.Join(cfg.Dir, "attachments")},
		links:    newLinks(cfg.Prefix, cfg.Pool),
		resolver: newResolver(cfg.Upstream),
		byID:     map[string]*attachment{},
		byAddr:   map[netip.Addr]*attachment{},
	}
	n.firewall = &firewall{prefix: cfg.Prefix, pool: cfg.Pool, group: n.links.group}
	if err := n.start(); err != nil {
		lock.Close()
		return nil, explain(op, "", err)
	}
	return n, nil
}

func (c *Config) complete() error {
	if c.Dir == "" || !prefixPattern.MatchString(c.Prefix) {
		return fmt.Errorf("a directory and a prefix matching %s are needed", prefixPattern)
	}
	if !c.Pool.IsValid() {
		c.Pool = DefaultPool
	}
	c.Pool = c.Pool.Masked()
	if !c.Pool.Addr().Is4() || c.Pool.Bits() < minPoolBits || c.Pool.Bits() > maxPoolBits {
		return fmt.Errorf("pool %s is not an IPv4 prefix of /%d to /%d", c.Pool, minPoolBits, maxPoolBits)
	}
	if c.Prewarm < 0 || c.Prewarm > maxPrewarm {
		return fmt.Errorf("%d prewarmed links: 0 to %d are possible", c.Prewarm, maxPrewarm)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, sandbox.E("lock", sandbox.Conflict, "", err).WithHint("another process serves this directory; stop it first")
	}
	return f, nil
}

// start adopts what exists, writes the table and begins to serve.
func (n *Network) start() (err error) {
	if err := n.adopt(); err != nil {
		return err
	}
	if n.forward, err = newForwarding(filepath.Join(n.cfg.Dir, "forwarding")); err != nil {
		return err
	}
	if _, _, err := n.forward.toward(anyInternet); err != nil {
		return err
	}
	addr, err := n.links.serviceAddress()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	if n.service, err = serve(ctx, n, addr); err != nil {
		cancel()
		return err
	}
	attached := map[block]*rules{}
	for _, a := range n.byID {
		attached[a.block] = a.rules.Load()
	}
	if err := n.firewall.install(n.service.at, n.forward.closed(), attached); err != nil {
		cancel()
		n.service.wait()
		return err
	}
	if others, err := n.firewall.obstacles(); err == nil && len(others) > 0 {
		n.log.Warn("another firewall drops forwarded packets by default; sandboxes may not reach the internet",
			"chains", others, "hint", "let it accept packets from and to devices named "+linkPrefix+"*")
	}
	n.running.Go(func() { n.tend(ctx) })
	if n.cfg.Prewarm > 0 {
		n.ready = make(chan block, n.cfg.Prewarm-1) // one more waits in the hand of prewarm
		n.running.Go(func() { n.prewarm(ctx) })
	}
	return nil
}

// adopt finds the attachments whose records and links both exist, and removes
// all else that carries our prefix.
func (n *Network) adopt() error {
	recorded, err := n.records.all()
	if err != nil {
		return err
	}
	have, err := n.links.list()
	if err != nil {
		return err
	}
	keep := map[block]bool{}
	for _, rec := range recorded {
		b := block(netip.PrefixFrom(rec.Link.Address.Addr().Prev().Prev(), blockBits))
		rules, err := compile(rec.Policy, n.cfg.Pool)
		_, statErr := os.Stat(n.links.netns(b))
		if err != nil || statErr != nil || !have[b] {
			if err := n.records.remove(rec.ID); err != nil {
				return err
			}
			continue
		}
		a := newAttachment()
		a.Attachment, a.block = rec, b
		a.rules.Store(rules)
		n.byID[a.ID], n.byAddr[b.address()] = a, a
		keep[b] = true
	}
	return n.links.sweep(keep)
}

// anyInternet stands for the internet when asking for a route; nothing is sent.
var anyInternet = netip.MustParseAddr("1.1.1.1")

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

// mtu is that of the device that leads to the internet, so that sandboxes need
// not discover it.
func (n *Network) mtu() int {
	if device, _, err := n.forward.toward(anyInternet); err == nil && device != nil {
		return max(device.Attrs().MTU, 576)
	}
	return defaultMTU
}

// openRoutes switches forwarding on toward the addresses that a policy names;
// for the internet start and tend have done it.
func (n *Network) openRoutes(policy sandbox.NetworkPolicy) error {
	any := false
	for _, entry := range policy.AllowOut {
		if p, ok := parsePrefix(entry); ok && p.Bits() > 0 {
			_, changed, err := n.forward.toward(p.Addr())
			if err != nil {
				return err
			}
			any = any || changed
		}
	}
	if any {
		return n.firewall.setClosed(n.forward.closed())
	}
	return nil
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
	a.rules.Store(rules)
	n.mu.Lock() // List reads the policy
	a.Attachment = next
	n.mu.Unlock()
	a.flows.cut(func(f *flow) bool { return !rules.decide(f.name, f.addr) })
	if err := forget(denied{from: a.block.address(), carrier: n.service.at.dns.Addr(), rules: rules}); err != nil {
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

// List returns every attachment in the order of the IDs, adopted ones included.
func (n *Network) List() []Attachment {
	n.mu.RLock()
	defer n.mu.RUnlock()
	out := make([]Attachment, 0, len(n.byAddr))
	for _, a := range n.byAddr { // not byID, which holds unfinished ones too
		out = append(out, a.Attachment)
	}
	slices.SortFunc(out, func(a, b Attachment) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// Sweep detaches everything that keep does not hold. It is for the start, before
// new sandboxes are made.
func (n *Network) Sweep(keep map[string]bool) error {
	var errs []error
	for _, a := range n.List() {
		if !keep[a.ID] {
			errs = append(errs, n.Detach(context.Background(), a.ID))
		}
	}
	return explain("network.Sweep", "", errors.Join(errs...))
}

// Stats returns the bytes that a sandbox received and sent since Attach. It
// fails with NotFound for an unknown id.
func (n *Network) Stats(id string) (rx, tx int64, err error) {
	const op = "network.Stats"
	a, unlock, err := n.locked(op, id)
	if err != nil {
		return 0, 0, err
	}
	defer unlock()
	rx, tx, err = n.links.traffic(a.block)
	return rx, tx, explain(op, id, err)
}

// Close stops serving. Attachments stay and keep their rules, without names,
// until the directory is opened again; if there are none, nothing is left.
func (n *Network) Close() error {
	n.stop()
	n.service.wait()
	n.running.Wait()
	var errs []error
	for len(n.ready) > 0 {
		errs = append(errs, n.links.remove(<-n.ready))
	}
	if len(n.List()) == 0 {
		errs = append(errs, n.firewall.uninstall(), n.links.removeServiceAddress(n.service.at.dns.Addr()))
	}
	return explain("network.Close", "", errors.Join(append(errs, n.lock.Close())...))
}

// prewarm keeps n.ready full until ctx ends.
func (n *Network) prewarm(ctx context.Context) {
	for ctx.Err() == nil {
		b, err := n.links.create(n.mtu())
		if err != nil {
			n.log.Warn("cannot prepare a network link", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(tendEvery):
			}
			continue
		}
		select {
		case n.ready <- b:
		case <-ctx.Done():
			if err := n.links.remove(b); err != nil {
				n.log.Warn("cannot remove a network link", "device", b.device(), "err", err)
			}
		}
	}
}

// tendForwarding follows the host when its routes or its own settings change.
func (n *Network) tendForwarding() error {
	before := n.firewall.closedDevices()
	if _, _, err := n.forward.toward(anyInternet); err != nil {
		return err
	}
	if now := n.forward.closed(); !slices.Equal(before, now) {
		return n.firewall.setClosed(now)
	}
	return nil
}

// tend keeps the kernel as it should be, whatever other software does to it.
func (n *Network) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		repaired, err := n.firewall.repair()
		if repaired {
			n.log.Warn("the firewall table was gone and has been written again", "table", n.firewall.name())
		}
		if err == nil {
			err = n.tendForwarding()
		}
		if err != nil {
			n.log.Error("cannot keep the firewall in place", "err", err)
		}
	}
}
