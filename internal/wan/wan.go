// Package wan emulates a slow, long, lossy link between two network namespaces of this host, for measurements and tests.
//
// Each end is a namespace with one TUN device; what the kernel at one end sends is read here, delayed, limited in rate,
// sometimes lost, and given to the other. So real kernels' TCP is measured, on any host that has /dev/net/tun. Which packets
// are lost depends on the seed and on their order only.
package wan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Path is what a link does to packets.
type Path struct {
	Rate  float64       // bits per second, in each direction
	Delay time.Duration // one way
	Loss  float64       // of packets from A to B, from 0 to 1; none the other way
	Queue int           // bytes that wait at most before the link; 0: what is sent in 50 ms
	Seed  uint64
}

// Addresses of the two ends.
var (
	AddrA = netip.MustParseAddr("10.213.77.1")
	AddrB = netip.MustParseAddr("10.213.77.2")
)

const (
	mtu         = 1500
	maxInFlight = 1 << 16 // packets; at most 100 MB
)

// Counts is what a link has carried from A to B, and the other way.
type Counts struct {
	Packets, Bytes, Lost atomic.Int64 // Lost: by chance or because the queue was full
}

// Link is a link that is up.
type Link struct {
	There, Back Counts
	ends        [2]end
	wg          sync.WaitGroup
}

// end is one namespace and its device.
type end struct {
	ns  *os.File
	tun *os.File
}

// Open makes a link. It needs root.
func Open(p Path) (*Link, error) {
	l := &Link{}
	for i, addr := range []netip.Addr{AddrA, AddrB} {
		e, err := newEnd(addr)
		l.ends[i] = e // what there is of it
		if err != nil {
			return nil, errors.Join(fmt.Errorf("wan: %w", err), l.Close())
		}
	}
	if p.Queue == 0 {
		p.Queue = int(p.Rate / 8 * 0.05)
	}
	a, b := l.ends[0].tun, l.ends[1].tun
	back := p
	back.Loss = 0
	l.carry(a, b, p, &l.There)
	l.carry(b, a, back, &l.Back)
	return l, nil
}

// Close takes the link down; what runs in its namespaces stays there without a network.
func (l *Link) Close() error {
	var errs []error
	for _, e := range l.ends {
		if e.tun != nil {
			errs = append(errs, e.tun.Close())
		}
		if e.ns != nil {
			errs = append(errs, e.ns.Close())
		}
	}
	l.wg.Wait()
	return errors.Join(errs...)
}

// Do runs fn on a thread of its own in the namespace of A (0) or B (1). Sockets that fn makes itself belong there; what it
// starts on other goroutines does not.
func (l *Link) Do(side int, fn func() error) error { return within(l.ends[side].ns, fn) }

// Start starts a command in the namespace of A (0) or B (1).
func (l *Link) Start(side int, cmd *exec.Cmd) error { return l.Do(side, cmd.Start) }

// within runs fn on a thread in a network namespace; nil makes a fresh one.
func within(ns *os.File, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		var err error
		if ns == nil {
			err = unix.Unshare(unix.CLONE_NEWNET)
		} else {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

func newEnd(addr netip.Addr) (e end, err error) {
	err = within(nil, func() error {
		var err error
		if e.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if e.tun, err = openTUN("wan0"); err != nil {
			return err
		}
		for _, name := range []string{"lo", "wan0"} {
			dev, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if name == "wan0" {
				address := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(30, 32)}}
				if err := errors.Join(netlink.LinkSetMTU(dev, mtu), netlink.LinkSetTxQLen(dev, 10_000), netlink.AddrAdd(dev, address)); err != nil {
					return err
				}
			}
			if err := netlink.LinkSetUp(dev); err != nil {
				return err
			}
		}
		return nil
	})
	return e, err
}

func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(ifr))); errno != 0 {
		return nil, errors.Join(errno, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tun"), nil
}

type packet struct {
	data []byte
	at   time.Time // when it arrives
}

// carry moves packets one way until the device is closed.
func (l *Link) carry(in, out *os.File, p Path, n *Counts) {
	flying := make(chan packet, maxInFlight)
	l.wg.Go(func() {
		for k := range flying {
			time.Sleep(time.Until(k.at))
			_, _ = out.Write(k.data) // a device that is closed, or has no room, loses it
		}
	})
	l.wg.Go(func() {
		defer close(flying)
		shape := newShaper(p)
		for {
			buf := make([]byte, mtu)
			size, err := in.Read(buf)
			if err != nil {
				return
			}
			at, ok := shape.send(time.Now(), size)
			if !ok {
				n.Lost.Add(1)
				continue
			}
			select {
			case flying <- packet{buf[:size], at}:
				n.Packets.Add(1)
				n.Bytes.Add(int64(size))
			default:
				n.Lost.Add(1)
			}
		}
	})
}
