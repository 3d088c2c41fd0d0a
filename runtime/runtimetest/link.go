package runtimetest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// NewLink makes a network namespace with a device for a sandbox and, at the other
// end of its cable, a gateway that greets who connects to port 8080. n tells links apart.
func NewLink(t *testing.T, n byte) *sandbox.Link {
	t.Helper()
	gateway := netip.AddrFrom4([4]byte{10, 98, n, 1})
	link := &sandbox.Link{
		NetNS: filepath.Join(t.TempDir(), "netns"), Device: "eth0",
		Address: netip.PrefixFrom(gateway.Next(), 30), Gateway: gateway,
	}
	if err := os.WriteFile(link.NetNS, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	listening := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends in the other namespace
		l, err := furnish(link)
		listening <- err
		if err != nil {
			return
		}
		t.Cleanup(func() { l.Close() })
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "hello %s\n", c.RemoteAddr())
			c.Close()
		}
	}()
	if err := <-listening; err != nil {
		t.Skipf("needs the right to make network namespaces: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(link.NetNS, unix.MNT_DETACH) })
	return link
}

// furnish makes the namespace of the calling thread what the link says.
func furnish(link *sandbox.Link) (net.Listener, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), link.NetNS, "", unix.MS_BIND, ""); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = link.Device
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0x61, 0x74, 0x6c, 0x00, 0x02}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "gw"}); err != nil {
		return nil, err
	}
	for name, addr := range map[string]netip.Addr{link.Device: link.Address.Addr(), "gw": link.Gateway} {
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return nil, err
		}
		ip := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(link.Address.Bits(), 32)}
		if err := netlink.AddrAdd(dev, &netlink.Addr{IPNet: ip}); err != nil {
			return nil, err
		}
		if err := netlink.LinkSetUp(dev); err != nil {
			return nil, err
		}
	}
	return net.Listen("tcp", netip.AddrPortFrom(link.Gateway, 8080).String())
}
