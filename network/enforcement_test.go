package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

const port = "7000"

var open = sandbox.NetworkPolicy{Internet: true}

func attach(t testing.TB, n *Network, id string, p sandbox.NetworkPolicy) sandbox.Link {
	t.Helper()
	l, err := n.Attach(t.Context(), id, p)
	must(t, err)
	return l
}

func reaches(t testing.TB, ns, addr, name string) {
	t.Helper()
	if got, err := greeting(t, ns, addr); err != nil || got != name {
		t.Errorf("%s: got %q, %v, want %q", addr, got, err, name)
	}
}

func refused(t testing.TB, ns, addr string) {
	t.Helper()
	if got, err := greeting(t, ns, addr); err == nil {
		t.Errorf("%s: reached %q", addr, got)
	}
}

// conformance: NFR1.3
func TestSandboxReachesTheInternetAndNothingElse(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "internet")
	greet(t, w.ns, privateAddr+":"+port, "private")
	greet(t, w.ns, metadataAddr+":80", "metadata")
	greet(t, hostNS, "0.0.0.0:"+port, "host")
	one, two := attach(t, n, "one", open), attach(t, n, "two", open)
	greet(t, two.NetNS, "0.0.0.0:"+port, "sibling")

	reaches(t, one.NetNS, siteA+":"+port, "internet")
	reaches(t, hostNS, two.Address.Addr().String()+":"+port, "sibling") // the host may dial in
	for what, addr := range map[string]string{
		"the host's public address": hostAddr,
		"the gateway":               one.Gateway.String(),
		"another gateway":           two.Gateway.String(),
		"the resolver's address":    n.service.at.dns.Addr().String(),
		"a sibling":                 two.Address.Addr().String(),
		"a private address":         privateAddr,
	} {
		t.Run(what, func(t *testing.T) { refused(t, one.NetNS, addr+":"+port) })
	}
	refused(t, one.NetNS, metadataAddr+":80")
}

func TestAllowListNamesWhatIsDeniedByDefault(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, privateAddr+":"+port, "private")
	greet(t, w.ns, metadataAddr+":"+port, "metadata")
	greet(t, w.ns, siteA+":"+port, "internet")
	greet(t, hostNS, "0.0.0.0:"+port, "host")
	two := attach(t, n, "two", open)
	greet(t, two.NetNS, "0.0.0.0:"+port, "sibling")
	one := attach(t, n, "one", sandbox.NetworkPolicy{
		AllowOut: []string{"10.0.0.0/8", hostAddr, two.Address.Addr().String(), "0.0.0.0/0"}})

	reaches(t, one.NetNS, privateAddr+":"+port, "private")
	reaches(t, one.NetNS, hostAddr+":"+port, "host")
	reaches(t, one.NetNS, two.Address.Addr().String()+":"+port, "sibling")
	reaches(t, one.NetNS, siteA+":"+port, "internet")
	refused(t, one.NetNS, metadataAddr+":"+port) // 0.0.0.0/0 does not name it
	refused(t, two.NetNS, one.Address.Addr().String()+":"+port)

	// A range that holds the host's address does not name the host.
	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{Internet: true, AllowOut: []string{"203.0.113.0/24"}}))
	refused(t, one.NetNS, hostAddr+":"+port)
}

// conformance: NFR1.3
func TestAllowBeatsDeny(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	for addr, name := range map[string]string{siteA: "a", siteB: "b", siteC: "c"} {
		greet(t, w.ns, addr+":"+port, name)
	}
	l := attach(t, n, "one", sandbox.NetworkPolicy{Internet: true, DenyOut: []string{"198.51.100.0/24"}, AllowOut: []string{siteB}})
	refused(t, l.NetNS, siteA+":"+port)
	reaches(t, l.NetNS, siteB+":"+port, "b")
	reaches(t, l.NetNS, siteC+":"+port, "c")

	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{AllowOut: []string{siteA, "198.51.100.0/28"}}))
	reaches(t, l.NetNS, siteA+":"+port, "a")
	refused(t, l.NetNS, siteB+":"+port)
	refused(t, l.NetNS, siteC+":"+port)
}

func TestUpdateCutsOpenConnectionsThatItDenies(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "a")
	greet(t, w.ns, siteB+":"+port, "b")
	l := attach(t, n, "one", open)
	cut, err := dialFrom(t, l.NetNS, siteA+":"+port)
	must(t, err)
	defer cut.Close()
	kept, err := dialFrom(t, l.NetNS, siteB+":"+port)
	must(t, err)
	defer kept.Close()
	expect(t, cut, "a\n")
	expect(t, kept, "b\n")
	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{Internet: true, DenyOut: []string{siteA}}))
	must(t, cut.SetDeadline(time.Now().Add(10*time.Second)))
	_, _ = cut.Write([]byte("still there?"))
	if n, err := cut.Read(make([]byte, 64)); err == nil || os.IsTimeout(err) {
		t.Errorf("the denied connection goes on: %d bytes, %v", n, err)
	}
	if _, err := kept.Write([]byte("echo")); err != nil {
		t.Error(err)
	}
	expect(t, kept, "echo")
	refused(t, l.NetNS, siteA+":"+port)
	must(t, n.Update(t.Context(), "one", open))
	reaches(t, l.NetNS, siteA+":"+port, "a")
}

func TestRulesAloneCutOpenConnections(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "a")
	l := attach(t, n, "one", open)
	c, err := dialFrom(t, l.NetNS, siteA+":"+port)
	must(t, err)
	defer c.Close()
	expect(t, c, "a\n")
	// Without what Update does besides: the kernel still knows the connection.
	none, err := compile(sandbox.NetworkPolicy{}, DefaultPool)
	must(t, err)
	must(t, n.firewall.set(n.byID["one"].block, none))
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	_, _ = c.Write([]byte("still there?"))
	if n, err := c.Read(make([]byte, 64)); err == nil || os.IsTimeout(err) {
		t.Errorf("the denied connection goes on: %d bytes, %v", n, err)
	}
}

func expect(t testing.TB, c net.Conn, want string) {
	t.Helper()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	buf := make([]byte, len(want))
	for got := 0; got < len(buf); {
		n, err := c.Read(buf[got:])
		must(t, err)
		got += n
	}
	if string(buf) != want {
		t.Fatalf("got %q, want %q", buf, want)
	}
}

func TestForgedSourcesAreDropped(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	l, other := attach(t, n, "one", open), attach(t, n, "two", open)
	var sink *net.UDPConn
	var err error
	within(t, w.ns, func() {
		sink, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(siteA+":"+port)))
	})
	must(t, err)
	defer sink.Close()
	var out wire
	within(t, l.NetNS, func() { out, err = openWire() })
	must(t, err)
	defer out.close()
	// The honest packet comes last: packets of one sender keep their order here.
	for _, src := range []string{"10.1.1.1", hostAddr, other.Address.Addr().String(), siteB, "0.0.0.0", l.Address.Addr().String()} {
		must(t, out.udp(netip.MustParseAddrPort(src+":4444"), netip.MustParseAddrPort(siteA+":"+port)))
	}
	must(t, err)
	buf := make([]byte, 64)
	must(t, sink.SetDeadline(time.Now().Add(5*time.Second)))
	size, err := sink.Read(buf)
	must(t, err)
	if got := string(buf[:size]); got != l.Address.Addr().String() {
		t.Fatalf("a packet came through that says it is from %s", got)
	}
}

// wire sends frames through a sandbox's device as they are, as a sandbox with a
// network stack of its own does.
type wire struct{ fd, device int }

// openWire opens the device of the calling thread's namespace.
func openWire() (wire, error) {
	dev, err := netlink.LinkByName(guestLink)
	if err != nil {
		return wire{}, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	return wire{fd, dev.Attrs().Index}, err
}

func (w wire) close() { unix.Close(w.fd) }

// udp sends a packet to the gateway under any source address; it says which.
func (w wire) udp(src, dst netip.AddrPort) error {
	p := make([]byte, 28, 64)
	p = append(p, src.Addr().String()...)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(p[12:], s[:])
	copy(p[16:], d[:])
	binary.BigEndian.PutUint16(p[20:], src.Port())
	binary.BigEndian.PutUint16(p[22:], dst.Port())
	binary.BigEndian.PutUint16(p[24:], uint16(len(p)-20))
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	frame := append(append(append([]byte{}, gatewayMAC...), guestMAC...), 0x08, 0x00)
	return unix.Sendto(w.fd, append(frame, p...), 0, &unix.SockaddrLinklayer{Ifindex: w.device, Protocol: 0x0008})
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func TestPingFollowsThePolicy(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", nil)
	l := attach(t, n, "one", open)
	ping := func(addr string) (err error) {
		within(t, l.NetNS, func() { err = ping(addr) })
		return err
	}
	must(t, ping(siteA))
	for _, addr := range []string{privateAddr, hostAddr, metadataAddr} {
		if ping(addr) == nil {
			t.Errorf("%s answers", addr)
		}
	}
}

// ping sends one echo request and waits for the answer or a refusal.
func ping(addr string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	dst := netip.MustParseAddr(addr).As4()
	echo := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}
	binary.BigEndian.PutUint16(echo[2:], checksum(echo))
	if err := unix.Sendto(fd, echo, 0, &unix.SockaddrInet4{Addr: dst}); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	buf := make([]byte, 256)
	for {
		size, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return err
		}
		switch kind := buf[20]; {
		case size > 20 && kind == 0:
			return nil
		case size > 20 && kind == 3:
			return fmt.Errorf("unreachable, code %d", buf[21])
		}
	}
}

func TestIPv6IsOff(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", nil)
	l := attach(t, n, "one", open)
	var err error
	var addrs []net.Addr
	within(t, l.NetNS, func() { addrs, err = net.InterfaceAddrs() })
	must(t, err)
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err != nil || !p.Addr().Is4() {
			t.Errorf("address %s", a)
		}
	}
}

func TestRealProcessUsesTheLink(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "internet")
	greet(t, w.ns, privateAddr+":"+port, "private")
	l := attach(t, n, "one", open)
	run := func(addr string) (line string) {
		within(t, l.NetNS, func() { _, line = start(t, order{Dial: addr}, nil) })
		return line
	}
	if got := run(siteA + ":" + port); got != "internet" {
		t.Errorf("got %q", got)
	}
	if got := run(privateAddr + ":" + port); !strings.Contains(got, "refused") {
		t.Errorf("got %q", got)
	}
}

func TestTwoNodesOnOneHostKeepApart(t *testing.T) {
	w := newWorld(t)
	a, b := openNetwork(t, "a", nil), openNetwork(t, "b", nil)
	greet(t, w.ns, siteA+":"+port, "internet")
	seen := map[netip.Addr]bool{}
	for i := range 8 {
		for _, n := range []*Network{a, b} {
			l := attach(t, n, fmt.Sprint("s", i), open)
			if seen[l.Address.Addr()] {
				t.Fatalf("%s was given twice", l.Address)
			}
			seen[l.Address.Addr()] = true
		}
	}
	ofA, ofB := a.List()[0].Link, b.List()[0].Link
	greet(t, ofB.NetNS, "0.0.0.0:"+port, "other node")
	reaches(t, ofA.NetNS, siteA+":"+port, "internet")
	reaches(t, ofB.NetNS, siteA+":"+port, "internet")
	refused(t, ofA.NetNS, ofB.Address.Addr().String()+":"+port)
	must(t, a.Update(t.Context(), "s0", sandbox.NetworkPolicy{AllowOut: []string{ofB.Address.Addr().String()}}))
	reaches(t, ofA.NetNS, ofB.Address.Addr().String()+":"+port, "other node")
}

func TestStrangersCannotPassThroughTheHost(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	l := attach(t, n, "one", open)
	greet(t, l.NetNS, "0.0.0.0:"+port, "sandbox")
	// A second wire behind the host, as of a container engine.
	ns, inside, err := newNetNS()
	must(t, err)
	defer ns.Close()
	defer inside.Close()
	path := filepath.Join(netnsDir, "behind")
	must(t, bindNetNS(ns, path))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "behind0"
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}))
	link, err := netlink.LinkByName("behind0")
	must(t, err)
	t.Cleanup(func() { must(t, netlink.LinkDel(link)); must(t, unbindNetNS(path)) })
	must(t, netlink.AddrAdd(link, mustAddr(t, "172.20.0.1/24")))
	must(t, netlink.LinkSetUp(link))
	must(t, setSysctl("ipv4/conf/behind0/forwarding", "1"))
	peer, err := inside.LinkByName("eth0")
	must(t, err)
	must(t, inside.AddrAdd(peer, mustAddr(t, "172.20.0.2/24")))
	must(t, inside.LinkSetUp(peer))
	must(t, inside.RouteAdd(&netlink.Route{Gw: net.ParseIP("172.20.0.1"), LinkIndex: peer.Attrs().Index}))
	greet(t, path, "0.0.0.0:"+port, "behind")
	reaches(t, hostNS, "172.20.0.2:"+port, "behind")

	// The neighbour on the outside has routes to all of it through the host.
	within(t, w.ns, func() {
		for _, dst := range []string{"172.20.0.0/24", "198.18.0.0/15"} {
			_, p, _ := net.ParseCIDR(dst)
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{Dst: p, Gw: net.ParseIP(hostAddr)})
			}
		}
	})
	must(t, err)
	unanswered(t, w.ns, "172.20.0.2:"+port)
	unanswered(t, w.ns, l.Address.Addr().String()+":"+port)
	unanswered(t, w.ns, n.service.at.dns.String())
	unanswered(t, w.ns, n.service.at.proxy.String())

	// Were the host a router, its neighbours behind would be its own business.
	must(t, n.firewall.setClosed(nil))
	reaches(t, w.ns, "172.20.0.2:"+port, "behind")
	unanswered(t, w.ns, l.Address.Addr().String()+":"+port)
}

// unanswered expects silence: packets of strangers are dropped.
func unanswered(t testing.TB, ns, addr string) {
	t.Helper()
	var err error
	var c net.Conn
	within(t, ns, func() { c, err = net.DialTimeout("tcp4", addr, 400*time.Millisecond) })
	if err == nil {
		c.Close()
		t.Errorf("%s answers a stranger", addr)
	}
}

func TestOneSandboxCannotFillTheConnectionTable(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", nil)
	l := attach(t, n, "one", open)
	var out wire
	var err error
	within(t, l.NetNS, func() { out, err = openWire() })
	must(t, err)
	defer out.close()
	for i := range maxConnections + 500 {
		must(t, out.udp(netip.AddrPortFrom(l.Address.Addr(), uint16(1024+i)), netip.MustParseAddrPort(siteA+":9")))
	}
	known, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	must(t, err)
	count := 0
	for _, f := range known {
		if f.Forward.SrcIP.String() == l.Address.Addr().String() {
			count++
		}
	}
	if count == 0 || count > maxConnections {
		t.Errorf("%d connections, at most %d are allowed", count, maxConnections)
	}
}

func TestStatsCountBytesOfTheSandbox(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, strings.Repeat("x", 1000))
	l := attach(t, n, "one", open)
	reaches(t, l.NetNS, siteA+":"+port, strings.Repeat("x", 64))
	rx, tx, err := n.Stats("one")
	must(t, err)
	if rx < 1000 || tx == 0 || tx >= rx {
		t.Errorf("received %d, sent %d", rx, tx)
	}
	if _, _, err := n.Stats("two"); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("got %v", err)
	}
}
