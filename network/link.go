package network

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netnsDir is where `ip netns` looks for names, so that an operator can look
// into a sandbox's network with common tools.
const netnsDir = "/run/netns"

// All links have the same two hardware addresses. Nobody else is on such a wire,
// and a machine restored on another link finds its gateway where it was.
var (
	gatewayMAC = net.HardwareAddr{0x02, 0x61, 0x74, 0x6c, 0x00, 0x01}
	guestMAC   = net.HardwareAddr{0x02, 0x61, 0x74, 0x6c, 0x00, 0x02}
)

// errFull says that the pool has no block left.
var errFull = errors.New("all addresses of the pool are in use")

// links makes and removes the kernel objects of attachments: a network
// namespace and a pair of devices. The devices carry the node's group from the
// moment they exist, so nothing made by a killed process goes unrecognised.
type links struct {
	prefix string
	group  uint32
	pool   blocks
	next   atomic.Uint32 // where to look for a free block; goes round, so that addresses rest before reuse
}

func newLinks(prefix string, pool netip.Prefix) *links {
	h := fnv.New32a()
	h.Write([]byte("atoll/" + prefix))
	l := &links{prefix: prefix, group: h.Sum32() | 1<<30, pool: blocksOf(pool)}
	l.next.Store(h.Sum32()) // nodes start at different places
	return l
}

func (l *links) netns(b block) string {
	return filepath.Join(netnsDir, "atoll-"+l.prefix+"-"+b.key())
}

// create makes the link of a free block, down to the default route inside.
// mtu is in bytes. A failed create leaves nothing.
func (l *links) create(mtu int) (b block, err error) {
	ns, inside, err := newNetNS()
	if err != nil {
		return b, err
	}
	defer ns.Close()
	defer inside.Close()
	if b, err = l.claim(ns, mtu); err != nil {
		return b, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.remove(b))
		}
	}()
	if err = bindNetNS(ns, l.netns(b)); err != nil {
		return b, err
	}
	if err = configureHost(b); err != nil {
		return b, err
	}
	if err = configureGuest(inside, b); err != nil {
		return b, err
	}
	if err = awaitUp(netlink.LinkByName, b.device()); err != nil {
		return b, err
	}
	return b, awaitUp(inside.LinkByName, guestLink)
}

// awaitUp returns when a device passes packets. The kernel brings the second end
// of a pair up in its own time, and what is sent before is lost: a connection
// would begin with a second of silence.
func awaitUp(get func(string) (netlink.Link, error), name string) error {
	for pause := 100 * time.Microsecond; pause < 2*time.Second; pause *= 2 {
		link, err := get(name)
		if err != nil {
			return err
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		<-time.After(pause)
	}
	return fmt.Errorf("device %s does not come up", name)
}

// claim makes the pair of devices under the first free block's name.
func (l *links) claim(ns *os.File, mtu int) (block, error) {
	sandboxes := l.pool.total - l.pool.services
	for range sandboxes {
		b := l.pool.at(l.pool.services + l.next.Add(1)%sandboxes)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Group, attrs.MTU, attrs.HardwareAddr = b.device(), l.group, mtu, gatewayMAC
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: guestLink, PeerHardwareAddr: guestMAC, PeerMTU: uint32(mtu),
			PeerNamespace: netlink.NsFd(ns.Fd()),
		})
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return block{}, fmt.Errorf("making a pair of devices: %w", err)
		}
		return b, nil
	}
	return block{}, errFull
}

// remove takes a link away; what is already gone is no error.
func (l *links) remove(b block) error {
	var errs []error
	link, err := netlink.LinkByName(b.device())
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
	case err != nil:
		errs = append(errs, err)
	case link.Attrs().Group == l.group:
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, unbindNetNS(l.netns(b)))...)
}

// list returns the blocks of all links of this node, finished or not.
func (l *links) list() (map[block]bool, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	out := map[block]bool{}
	for _, link := range all {
		if b, ok := blockOf(link.Attrs().Name); ok && link.Attrs().Group == l.group {
			out[b] = true
		}
	}
	return out, nil
}

// sweep removes the links and namespaces of this node whose block is not in keep.
func (l *links) sweep(keep map[block]bool) error {
	have, err := l.list()
	if err != nil {
		return err
	}
	names, err := filepath.Glob(filepath.Join(netnsDir, "atoll-"+l.prefix+"-????????"))
	if err != nil {
		return err
	}
	for _, name := range names {
		if b, ok := blockOf(linkPrefix + name[strings.LastIndexByte(name, '-')+1:]); ok {
			have[b] = true
		}
	}
	var errs []error
	for b := range have {
		if !keep[b] {
			errs = append(errs, l.remove(b))
		}
	}
	return errors.Join(errs...)
}

// serviceAddress returns the node's own address on the loopback device, where
// its resolver and proxy listen. The label marks whose it is.
func (l *links) serviceAddress() (netip.Addr, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return netip.Addr{}, err
	}
	have, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range have {
		if addr, ok := netip.AddrFromSlice(a.IP.To4()); ok && a.Label == l.label() {
			return addr, nil
		}
	}
	for i := range l.pool.services {
		addr := l.pool.at((i + l.group) % l.pool.services).gateway()
		// Scope host: never chosen as the source of the host's own traffic.
		err := netlink.AddrAdd(lo, &netlink.Addr{
			IPNet: ipNet(netip.PrefixFrom(addr, 32)), Label: l.label(), Scope: int(netlink.SCOPE_HOST)})
		switch {
		case err == nil:
			return addr, nil
		case !errors.Is(err, unix.EEXIST):
			return netip.Addr{}, err
		}
	}
	return netip.Addr{}, errFull
}

func (l *links) removeServiceAddress(addr netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	err = netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, 32)), Label: l.label()})
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

func (l *links) label() string { return "lo:" + l.prefix }

// traffic reads the bytes that the sandbox received and sent.
func (l *links) traffic(b block) (rx, tx int64, err error) {
	link, err := netlink.LinkByName(b.device())
	if err != nil {
		return 0, 0, err
	}
	s := link.Attrs().Statistics
	if s == nil {
		return 0, 0, errors.New("the kernel gave no statistics")
	}
	return int64(s.TxBytes), int64(s.RxBytes), nil // the host sends what the sandbox receives
}

// newNetNS makes a network namespace without IPv6 and a netlink handle in it.
func newNetNS() (ns *os.File, inside *netlink.Handle, err error) {
	runtime.LockOSThread()
	host, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return nil, nil, err
	}
	defer host.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, nil, fmt.Errorf("making a network namespace: %w", err)
	}
	ns, err = os.Open("/proc/thread-self/ns/net")
	if err == nil {
		inside, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	for _, key := range []string{"all", "default"} {
		if err == nil {
			err = setSysctl("ipv6/conf/"+key+"/disable_ipv6", "1")
		}
	}
	if back := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked: it ends with this goroutine and never runs
		// another one in the wrong namespace.
		err = errors.Join(err, fmt.Errorf("leaving a network namespace: %w", back))
	} else {
		runtime.UnlockOSThread()
	}
	if err != nil && ns != nil {
		ns.Close()
	}
	if err != nil && inside != nil {
		inside.Close()
	}
	return ns, inside, err
}

func bindNetNS(ns *os.File, path string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("naming a network namespace: %w", err)
	}
	return nil
}

func unbindNetNS(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// configureHost sets up the host's end. Only this device forwards, whatever the
// host's other devices do; it has no IPv6, answers ARP for the gateway
// alone and takes no advice on routes.
func configureHost(b block) error {
	dev := b.device()
	for _, s := range [][2]string{
		{"ipv6/conf/" + dev + "/disable_ipv6", "1"},
		{"ipv4/conf/" + dev + "/forwarding", "1"},
		{"ipv4/conf/" + dev + "/arp_ignore", "1"},
		{"ipv4/conf/" + dev + "/send_redirects", "0"},
		{"ipv4/conf/" + dev + "/accept_redirects", "0"},
	} {
		if err := setSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(b.gateway(), blockBits))}); err != nil {
		return fmt.Errorf("giving %s its address: %w", dev, err)
	}
	return netlink.LinkSetUp(link)
}

func configureGuest(inside *netlink.Handle, b block) error {
	for _, name := range []string{"lo", guestLink} {
		link, err := inside.LinkByName(name)
		if err != nil {
			return err
		}
		if name == guestLink {
			addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(b.address(), blockBits))}
			if err := inside.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("giving the sandbox its address: %w", err)
			}
		}
		if err := inside.LinkSetUp(link); err != nil {
			return err
		}
		if name == guestLink {
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: b.gateway().AsSlice()}
			if err := inside.RouteAdd(route); err != nil {
				return fmt.Errorf("giving the sandbox its route: %w", err)
			}
		}
	}
	return nil
}

// setSysctl writes a setting below /proc/sys/net in the calling thread's
// namespace. A kernel without IPv6 has nothing to switch off.
func setSysctl(key, value string) error {
	err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644)
	if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(key, "ipv6/") {
		return nil
	}
	return err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
