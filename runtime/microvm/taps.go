package microvm

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// guestMAC is the address of every machine's network device. Nobody else is on
// its wire but the gateway.
var guestMAC = net.HardwareAddr{0x02, 0x61, 0x74, 0x6c, 0x00, 0x02}

// taps makes the host's ends of machines' network devices. They begin in a
// network namespace that leads nowhere, so that a machine can be made before it
// is known to whom it will belong, and move into the namespace of its link.
type taps struct {
	nursery *os.File
	last    atomic.Uint32 // names the devices
}

// tap is one of them. It is gone once nobody has it open.
type tap struct {
	name string
	file *os.File // for the machine's monitor
}

func openTaps() (*taps, error) {
	var t taps
	err := inThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		var err error
		t.nursery, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return &t, err
}

func (t *taps) close() { t.nursery.Close() }

// make makes a device.
func (t *taps) make() (*tap, error) {
	d := &tap{name: fmt.Sprintf("vm%d", t.last.Add(1))}
	err := inThread(func() error {
		if err := unix.Setns(int(t.nursery.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		d.file = os.NewFile(uintptr(fd), d.name)
		req, err := unix.NewIfreq(d.name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	})
	if err != nil {
		if d.file != nil {
			d.file.Close()
		}
		return nil, fmt.Errorf("make a tap device: %w", err)
	}
	return d, nil
}

// join moves a device into the namespace of a link and joins both: all that the
// machine sends goes out of the link's device and the other way round, so that
// whatever policy there is for the link holds for the machine. The machine takes
// over the link's address; mtu is the link's, in bytes.
func (t *taps) join(name string, link *sandbox.Link) (mtu int, err error) {
	err = inThread(func() error {
		target, err := os.Open(link.NetNS)
		if err != nil {
			return err
		}
		defer target.Close()
		if err := unix.Setns(int(t.nursery.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkSetNsFd(dev, int(target.Fd())); err != nil {
			return fmt.Errorf("move %s: %w", name, err)
		}
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		mtu, err = joinDevices(name, link.Device)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("join the machine with its link: %w", err)
	}
	return mtu, nil
}

// joinDevices joins two devices of the calling thread's namespace.
func joinDevices(tapName, linkName string) (mtu int, err error) {
	tapDev, err := netlink.LinkByName(tapName)
	if err != nil {
		return 0, err
	}
	linkDev, err := netlink.LinkByName(linkName)
	if err != nil {
		return 0, err
	}
	mtu = linkDev.Attrs().MTU
	// The host's kernel would answer for the addresses, too.
	addrs, err := netlink.AddrList(linkDev, netlink.FAMILY_ALL)
	if err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if err := netlink.AddrDel(linkDev, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return 0, fmt.Errorf("take the address off %s: %w", linkName, err)
		}
	}
	if err := netlink.LinkSetMTU(tapDev, mtu); err != nil {
		return 0, err
	}
	if err := netlink.LinkSetUp(tapDev); err != nil {
		return 0, err
	}
	if err := redirect(tapDev, linkDev); err != nil {
		return 0, err
	}
	return mtu, redirect(linkDev, tapDev)
}

// redirect sends all that comes in on one device out of another.
func redirect(from, to netlink.Link) error {
	index := from.Attrs().Index
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
	// A link may have had a machine before, whose device its rule still names.
	_ = netlink.QdiscDel(ingress)
	if err := netlink.QdiscAdd(ingress); err != nil {
		return fmt.Errorf("watch what comes in on %s: %w", from.Attrs().Name, err)
	}
	err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	})
	if err != nil {
		return fmt.Errorf("redirect %s to %s: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// linkBytes reads how much the sandbox received and sent.
func linkBytes(link *sandbox.Link) (rx, tx int64, err error) {
	a, err := linkAttrs(link)
	if err == nil && a.Statistics != nil {
		rx, tx = int64(a.Statistics.RxBytes), int64(a.Statistics.TxBytes)
	}
	return rx, tx, err
}

// linkMTU reads the size of the longest packets of a link, in bytes.
func linkMTU(link *sandbox.Link) (int, error) {
	a, err := linkAttrs(link)
	if err != nil {
		return 0, err
	}
	return a.MTU, nil
}

// linkAttrs reads what the kernel knows of a link's device.
func linkAttrs(link *sandbox.Link) (a *netlink.LinkAttrs, err error) {
	err = inThread(func() error {
		ns, err := os.Open(link.NetNS)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		dev, err := netlink.LinkByName(link.Device)
		if err == nil {
			a = dev.Attrs()
		}
		return err
	})
	return a, err
}

// inThread calls f in a thread that ends with the call, so that nothing else
// ever runs in the namespace into which f went.
func inThread(f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		errc <- f()
	}()
	return <-errc
}
