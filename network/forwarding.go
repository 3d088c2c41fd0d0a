package network

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forwarding lets packets pass between sandboxes and the devices that lead
// where they may go. The kernel checks the setting of the device a packet came
// in on, so answers need it on the outward device too. The host as a whole is
// not made a router: while its own switch is off, the firewall lets packets from
// such a device go to sandboxes only.
type forwarding struct {
	path string // of the list of devices that did not forward before

	mu     sync.Mutex
	opened []string
}

func newForwarding(path string) (*forwarding, error) {
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return &forwarding{path: path, opened: strings.Fields(string(raw))}, nil
}

// toward returns the device that leads to addr and switches its forwarding on;
// changed reports whether it was off. A host without a route there has an empty
// device and no error.
func (f *forwarding) toward(addr netip.Addr) (device netlink.Link, changed bool, err error) {
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) {
			err = nil
		}
		return nil, false, err
	}
	device, err = netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return nil, false, err
	}
	name := device.Attrs().Name
	if strings.HasPrefix(name, linkPrefix) || device.Attrs().Flags&unix.IFF_LOOPBACK != 0 {
		return device, false, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	key := "ipv4/conf/" + name + "/forwarding"
	if on, err := os.ReadFile("/proc/sys/net/" + key); err != nil || strings.TrimSpace(string(on)) == "1" {
		return device, false, err
	}
	// The list first: a device that forwards and is not in it would stay open.
	f.opened = append(f.opened, name)
	if err := os.WriteFile(f.path, []byte(strings.Join(f.opened, "\n")), 0o600); err != nil {
		return device, false, err
	}
	return device, true, setSysctl(key, "1")
}

// closed returns the devices that forward to sandboxes only: none when the
// host's owner made it a router.
func (f *forwarding) closed() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if on, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(on)) == "1" {
		return nil
	}
	return append([]string(nil), f.opened...)
}

// isLocal reports whether addr belongs to this host.
func isLocal(addr netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil {
		return false, err
	}
	return len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST, nil
}
