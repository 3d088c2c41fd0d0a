package gvisor_test

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

// newLink makes a network namespace with a link for a sandbox and, at the other
// end of its cable, a gateway on which a server greets everyone. n tells links apart.
func newLink(t *testing.T, n int) *sandbox.Link {
	t.Helper()
	gateway := netip.AddrFrom4([4]byte{10, 99, byte(n), 1})
	link := &sandbox.Link{
		NetNS: filepath.Join(t.TempDir(), "netns"), Device: "eth0",
		Address: netip.PrefixFrom(gateway.Next(), 30), Gateway: gateway,
	}
	if err := os.WriteFile(link.NetNS, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and let it end in the other namespace
		l, err := furnish(link)
		errc <- err
		if err != nil {
			return
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "hello %s\n", c.RemoteAddr())
				c.Close()
			}
		}()
	}()
	if err := <-errc; err != nil {
		t.Skipf("needs the right to make network namespaces: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(link.NetNS, unix.MNT_DETACH) })
	return link
}

// furnish makes the namespace in the calling thread.
func furnish(link *sandbox.Link) (net.Listener, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), link.NetNS, "", unix.MS_BIND, ""); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = link.Device
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "gw"}); err != nil {
		return nil, err
	}
	for name, addr := range map[string]netip.Addr{link.Device: link.Address.Addr(), "gw": link.Gateway} {
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return nil, err
		}
		a, err := netlink.ParseAddr(netip.PrefixFrom(addr, link.Address.Bits()).String())
		if err != nil {
			return nil, err
		}
		if err := netlink.AddrAdd(dev, a); err != nil {
			return nil, err
		}
		if err := netlink.LinkSetUp(dev); err != nil {
			return nil, err
		}
	}
	return net.Listen("tcp", netip.AddrPortFrom(link.Gateway, 8080).String())
}

// conformance: FR5.2 NFR4.1
func TestASandboxUsesItsLinkAndAForkItsOwn(t *testing.T) {
	first, second := newLink(t, 1), newLink(t, 2)
	r, spec := start(t, func(s *sandbox.Spec) { s.Network, s.Link = sandbox.NetworkSandbox, first })
	greet := func(id string, link *sandbox.Link) {
		t.Helper()
		got := sh(t, r, id, fmt.Sprintf("exec bash -c 'exec 3<>/dev/tcp/%s/8080; read -r a b <&3; echo $a ${b%%%%:*}'", link.Gateway))
		if want := fmt.Sprintf("hello %s\n", link.Address.Addr()); got != want {
			t.Errorf("%s hears %q, want %q", id, got, want)
		}
		if got := sh(t, r, id, "head -n 1 /etc/resolv.conf"); got != "nameserver "+link.Gateway.String()+"\n" {
			t.Errorf("%s asks the resolver %q", id, got)
		}
	}
	greet(spec.ID, first)
	st, err := r.Stats(t.Context(), spec.ID)
	if err != nil || st.RxBytes == 0 || st.TxBytes == 0 {
		t.Errorf("after a conversation the link has received %d and sent %d bytes, %v", st.RxBytes, st.TxBytes, err)
	}
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), spec.ID, state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	greet(spec.ID, first)
	fork := spec
	fork.ID, fork.Link = "fork", second
	if err := r.Restore(t.Context(), fork, state); err != nil {
		t.Fatal(err)
	}
	greet("fork", second)
	greet(spec.ID, first)
}
