package network

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forwardingDir holds a file per device whose forwarding some node of this host
// switched on. Like the setting itself it is gone after a restart of the host.
const forwardingDir = "/run/atoll/forwarding"

// toward returns the device that leads to addr and switches its forwarding on;
// changed reports whether it was off. A host without a route there has a nil
// device and no error.
//
// The kernel checks the setting of the device that a packet came in on, so
// answers need it on the outward device too. The host as a whole is not made a
// router: see closedDevices.
func toward(addr netip.Addr) (device netlink.Link, changed bool, err error) {
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
	if strings.HasPrefix(name, linkPrefix) || name == "lo" {
		return device, false, nil
	}
	if on, err := forwards(name); on || err != nil {
		return device, false, err
	}
	// The file first: a device that forwards and has none would stay open.
	if err := os.MkdirAll(forwardingDir, 0o755); err != nil {
		return device, false, err
	}
	if err := os.WriteFile(filepath.Join(forwardingDir, name), nil, 0o644); err != nil {
		return device, false, err
	}
	return device, true, setSysctl("ipv4/conf/"+name+"/forwarding", "1")
}

// closedDevices returns the devices from which the firewall lets packets go to
// sandboxes only, in order: those that forwarded nothing before a node needed
// them. It is empty when the host's owner made it a router.
func closedDevices() ([]string, error) {
	if on, err := forwards("all"); on || err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(forwardingDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, nil
}

// restoreForwarding undoes toward on a host without other nodes.
func restoreForwarding() error {
	closed, err := closedDevices()
	if err != nil {
		return err
	}
	for _, name := range closed {
		err := setSysctl("ipv4/conf/"+name+"/forwarding", "0")
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // the device may be gone
			return err
		}
	}
	return os.RemoveAll(forwardingDir)
}

// forwards reports whether a device, or all of them, forwards packets.
func forwards(device string) (bool, error) {
	raw, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + device + "/forwarding")
	return strings.TrimSpace(string(raw)) == "1", err
}

// isLocal reports whether addr is not another host's.
func isLocal(addr netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil {
		return false, err
	}
	return len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST, nil
}
