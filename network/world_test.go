package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests run in a network namespace and a mount namespace of their own: what
// they call the host is that namespace, what they call the internet is another
// one joined to it. No packet leaves the two.

const insideEnv = "ATOLL_NETWORK_TEST_INSIDE"

var (
	privileged bool
	hostNS     string // path of the network namespace that the tests call the host
)

func TestMain(m *testing.M) {
	if command := os.Getenv(helperEnv); command != "" {
		os.Exit(helper(command))
	}
	if os.Getenv(insideEnv) == "" && os.Geteuid() == 0 {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), insideEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case err == nil:
			os.Exit(0)
		case errors.As(err, &exit):
			os.Exit(max(exit.ExitCode(), 1))
		case !errors.Is(err, os.ErrPermission):
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if os.Getenv(insideEnv) != "" {
		if err := prepareHost(); err != nil {
			fmt.Fprintln(os.Stderr, "preparing the test host:", err)
			os.Exit(1)
		}
		privileged = true
	}
	os.Exit(m.Run())
}

func prepareHost() error {
	// Not by the name of this process: its first thread may end up elsewhere.
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	hostNS = fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	// Let go of the namespaces that others named: they come and go as they like.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(line, " nsfs ") && strings.HasPrefix(f[4], netnsDir) {
			_ = unix.Unmount(f[4], unix.MNT_DETACH) // perhaps gone meanwhile
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return errors.Join(
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		os.MkdirAll(netnsDir, 0o755),
		netlink.LinkSetUp(lo))
}

func needPrivilege(t testing.TB) {
	t.Helper()
	if !privileged {
		t.Skip("needs root with the right to make network namespaces")
	}
}

// Addresses of the test's internet.
const (
	hostAddr     = "203.0.113.1" // of the host, public
	resolverAddr = "203.0.113.53"
	siteA        = "198.51.100.10"
	siteB        = "198.51.100.20"
	siteC        = "192.88.99.30"
	privateAddr  = "10.9.9.9"
	metadataAddr = "169.254.169.254"
)

// world is an internet next to the test host.
type world struct {
	ns string // path of its network namespace
}

func newWorld(t testing.TB) *world {
	t.Helper()
	needPrivilege(t)
	ns, inside, err := newNetNS()
	must(t, err)
	defer ns.Close()
	defer inside.Close()
	w := &world{ns: netnsDir + "/internet"}
	must(t, bindNetNS(ns, w.ns))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "wan0"
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "wan0", PeerNamespace: netlink.NsFd(ns.Fd())}))
	wan, err := netlink.LinkByName("wan0")
	must(t, err)
	t.Cleanup(func() {
		must(t, netlink.LinkDel(wan))
		must(t, unbindNetNS(w.ns))
	})
	must(t, netlink.AddrAdd(wan, mustAddr(t, hostAddr+"/24")))
	must(t, netlink.LinkSetUp(wan))
	must(t, setSysctl("ipv4/conf/wan0/forwarding", "0"))
	peer, err := inside.LinkByName("wan0")
	must(t, err)
	must(t, inside.AddrAdd(peer, mustAddr(t, "203.0.113.254/24")))
	must(t, inside.AddrAdd(peer, mustAddr(t, resolverAddr+"/24")))
	must(t, inside.LinkSetUp(peer))
	lo, err := inside.LinkByName("lo")
	must(t, err)
	must(t, inside.LinkSetUp(lo))
	for _, a := range []string{siteA, siteB, siteC, privateAddr, metadataAddr} {
		must(t, inside.AddrAdd(lo, mustAddr(t, a+"/32")))
	}
	must(t, awaitUp(netlink.LinkByName, "wan0"))
	must(t, awaitUp(inside.LinkByName, "wan0"))
	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("203.0.113.254"), LinkIndex: wan.Attrs().Index}))
	return w
}

func mustAddr(t testing.TB, s string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(s)
	must(t, err)
	return a
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within runs f in the network namespace at path. Sockets that f makes stay
// there. f must not start goroutines that make sockets.
func within(t testing.TB, path string, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	must(t, <-done)
}

// greet serves TCP on an address of the namespace: whoever connects is told
// the server's name, then echoed.
func greet(t testing.TB, ns, addr, name string) {
	t.Helper()
	var l net.Listener
	var err error
	within(t, ns, func() { l, err = net.Listen("tcp4", addr) })
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprint(c, name+"\n")
				buf := make([]byte, 1024)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// dialFrom connects from inside a namespace.
func dialFrom(t testing.TB, ns, addr string) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	within(t, ns, func() { c, err = net.DialTimeout("tcp4", addr, 5*time.Second) })
	return c, err
}

// greeting connects from inside a namespace and reads the server's name.
func greeting(t testing.TB, ns, addr string) (string, error) {
	t.Helper()
	c, err := dialFrom(t, ns, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	return strings.TrimSpace(string(buf[:n])), err
}

func openNetwork(t testing.TB, prefix string, change func(*Config)) *Network {
	t.Helper()
	cfg := Config{Dir: t.TempDir(), Prefix: prefix, Upstream: []netip.AddrPort{netip.MustParseAddrPort(resolverAddr + ":53")}}
	if change != nil {
		change(&cfg)
	}
	n, err := Open(cfg)
	must(t, err)
	t.Cleanup(func() {
		must(t, n.Sweep(nil))
		must(t, n.Close())
	})
	return n
}
