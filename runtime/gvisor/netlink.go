package gvisor

import (
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/urpc"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/sandbox"
)

// socketBuffer is the size of the link socket's buffers in bytes. The kernel's
// default of 208 KiB loses packets at high rates.
const socketBuffer = 4 << 20

// networkArgs says what the sentry's network stack is made of. The sentry itself
// always lives in an empty network namespace; with a link it gets a raw socket on
// the link's device, opened here, and takes over the device's address. The
// caller closes the returned files after the call that carries them.
func networkArgs(link *sandbox.Link, restore bool) (*orders.Network, error) {
	args := &orders.Network{LoopbackLinks: []orders.Loopback{orders.LocalLink}, IsRestore: restore}
	if link == nil {
		return args, nil
	}
	dev, sock, err := openLink(link)
	if err != nil {
		return nil, fmt.Errorf("open link %s in %s: %w", link.Device, link.NetNS, err)
	}
	addr := net.IP(link.Address.Addr().AsSlice())
	subnet := link.Address.Masked()
	args.FilePayload = urpc.FilePayload{Files: []*os.File{sock}}
	args.FDBasedLinks = []orders.FDLink{{
		Name:              "eth0",
		MTU:               dev.MTU,
		LinkAddress:       dev.HardwareAddr,
		Addresses:         []orders.Address{{Address: addr, PrefixLen: link.Address.Bits()}},
		Routes:            []orders.Route{{Destination: *ipNet(subnet.Addr().AsSlice(), subnet.Bits())}},
		QDisc:             orders.QueueFIFO,
		RXChecksumOffload: true,
		GSOMaxSize:        orders.MaxSegmentSize,
		GVisorGSOEnabled:  true,
		NumChannels:       1,
	}}
	args.Defaultv4Gateway = orders.DefaultRoute{
		Name:  "eth0",
		Route: orders.Route{Destination: *ipNet(net.IPv4zero.To4(), 0), Gateway: net.IP(link.Gateway.AsSlice())},
	}
	return args, nil
}

func ipNet(ip []byte, bits int) *net.IPNet {
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, 8*len(ip))}
}

// openLink opens the raw socket of the device in the link's namespace and takes
// the addresses off the device, as otherwise the host's kernel would answer there too.
func openLink(link *sandbox.Link) (dev *netlink.LinkAttrs, sock *os.File, err error) {
	err = inNetNS(link.NetNS, func() (err error) {
		dev, sock, err = openDevice(link.Device)
		return err
	})
	return dev, sock, err
}

// linkBytes reads how much the sandbox received and sent.
func linkBytes(link *sandbox.Link) (rx, tx int64, err error) {
	err = inNetNS(link.NetNS, func() error {
		dev, err := netlink.LinkByName(link.Device)
		if err == nil && dev.Attrs().Statistics != nil {
			rx, tx = int64(dev.Attrs().Statistics.RxBytes), int64(dev.Attrs().Statistics.TxBytes)
		}
		return err
	})
	return rx, tx, err
}

// inNetNS calls f in a thread that is in the namespace. The thread ends with the
// call, so that nothing else ever runs in the wrong namespace.
func inNetNS(path string, f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		ns, err := os.Open(path)
		if err != nil {
			errc <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			errc <- err
			return
		}
		errc <- f()
	}()
	return <-errc
}

// openDevice does the work of openLink inside the namespace.
func openDevice(name string) (*netlink.LinkAttrs, *os.File, error) {
	dev, err := netlink.LinkByName(name)
	if err != nil {
		return nil, nil, err
	}
	addrs, err := netlink.AddrList(dev, netlink.FAMILY_ALL)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range addrs {
		if err := netlink.AddrDel(dev, &a); err != nil {
			return nil, nil, err
		}
	}
	// Protocol 0 at first: a socket that hears everything is slow to bind.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	const allProtocols = 0x0300 // ETH_P_ALL in network order
	addr := &unix.SockaddrLinklayer{Protocol: allProtocols, Ifindex: dev.Attrs().Index}
	if err := unix.Bind(fd, addr); err != nil {
		unix.Close(fd)
		return nil, nil, err
	}
	for _, opt := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, socketBuffer); err != nil {
			unix.Close(fd)
			return nil, nil, err
		}
	}
	return dev.Attrs(), os.NewFile(uintptr(fd), "link"), nil
}
