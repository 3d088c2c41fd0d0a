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
// The proxy decides where a connection goes, not what is said inside it: servers
// that also answer for other names can be asked for those.
//
// IPv6 is off: sandboxes have no IPv6 address, IPv6 packets are dropped and AAAA
// questions get empty answers.
package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	Pool     netip.Prefix     // IPv4, /8 to /26; each sandbox takes a /30. Default: DefaultPool. Attachments of another pool are not adopted
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
	resolver *resolver
	address  netip.Addr // of the service, on the loopback device
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
	defer func() {
		if err != nil && len(n.byID) == 0 && n.address.IsValid() {
			err = errors.Join(err, n.uninstall())
		}
	}()
	if err := n.adopt(); err != nil {
		return err
	}
	if _, _, err := toward(anyInternet); err != nil {
		return err
	}
	closed, err := closedDevices()
	if err != nil {
		return err
	}
	if n.address, err = n.links.serviceAddress(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	if n.service, err = serve(ctx, n, n.address); err != nil {
		cancel()
		return err
	}
	attached := map[block]*rules{}
	for _, a := range n.byID {
		attached[a.block] = a.rules.Load()
	}
	if err := n.firewall.install(n.service.at, closed, attached); err != nil {
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
		b := block(rec.Link.Address.Masked())
		rules, err := compile(rec.Policy, n.cfg.Pool)
		_, statErr := os.Stat(rec.Link.NetNS)
		if err != nil || statErr != nil || !have[b] || !n.cfg.Pool.Contains(b.address()) {
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

// Close stops serving; it is called once. Attachments stay and keep their rules,
// without names, until the directory is opened again; if there are none, nothing
// is left.
func (n *Network) Close() error {
	n.stop()
	n.service.wait()
	n.running.Wait()
	var errs []error
	for len(n.ready) > 0 {
		errs = append(errs, n.links.remove(<-n.ready))
	}
	if len(n.List()) == 0 {
		errs = append(errs, n.uninstall())
	}
	return explain("network.Close", "", errors.Join(append(errs, n.lock.Close())...))
}

// uninstall removes what the node itself has in the kernel.
func (n *Network) uninstall() error {
	others, err := n.firewall.uninstall()
	if err == nil && others == 0 {
		err = restoreForwarding()
	}
	return errors.Join(err, n.links.removeServiceAddress(n.address))
}

// explain gives an error of the kernel its kind and says what helps.
func explain(op, subject string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrPermission): // EPERM, EACCES, and EROFS below
		return sandbox.E(op, sandbox.Denied, subject, err).WithHint(privilegeHint)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return sandbox.E(op, sandbox.Denied, subject, err).WithHint(privilegeHint)
	case errors.Is(err, errFull):
		return sandbox.E(op, sandbox.Exhausted, subject, err).WithHint("give the node a larger address pool or remove sandboxes")
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return sandbox.E(op, sandbox.Exhausted, subject, err)
	}
	return sandbox.E(op, "", subject, err)
}

const privilegeHint = "sandbox networks need root or CAP_NET_ADMIN with CAP_SYS_ADMIN, and a kernel with nf_tables; otherwise use network mode none"
