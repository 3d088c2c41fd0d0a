package server

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
)

// The network interface is set by the oldest calls there are: each does one
// thing and returns nothing to be parsed. A new machine has translated none of
// its code yet when it is emulated, so every instruction counts here.

// interfaceName is the name of the network device: the one that the kernel gives the
// first, unless the machine's own system has named its only one otherwise.
func interfaceName() string {
	const kernels, devices = "eth0", "/sys/class/net/"
	if unix.Access(devices+kernels, unix.F_OK) == nil {
		return kernels
	}
	found, _ := filepath.Glob(devices + "*/device")
	if len(found) != 1 {
		return kernels
	}
	return filepath.Base(filepath.Dir(found[0]))
}

// configure gives the interface its address in place of the one that it had.
// With that go its routes and neighbours.
func configure(n wire.MachineNetwork) error {
	if !n.Address.Addr().Is4() || n.Gateway.IsValid() && !n.Gateway.Is4() {
		return errors.New("the interface takes IPv4 addresses only")
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	name := interfaceName()
	if n.MAC != "" {
		if err := setMAC(fd, name, n.MAC); err != nil {
			return fmt.Errorf("set %s's MAC address: %w", name, err)
		}
	}
	const mask = unix.SIOCSIFNETMASK
	for _, step := range []struct {
		what string
		call uint
		set  func(*unix.Ifreq) error
		skip bool
	}{
		{"MTU", unix.SIOCSIFMTU, func(r *unix.Ifreq) error { r.SetUint32(uint32(n.MTU)); return nil }, n.MTU == 0},
		{"address", unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(n.Address.Addr().AsSlice()) }, false},
		{"network mask", mask, func(r *unix.Ifreq) error { return r.SetInet4Addr(net.CIDRMask(n.Address.Bits(), 32)) }, false},
		{"state", unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error {
			r.SetUint16(unix.IFF_UP | unix.IFF_BROADCAST | unix.IFF_MULTICAST)
			return nil
		}, false},
	} {
		if step.skip {
			continue
		}
		r, err := unix.NewIfreq(name)
		if err == nil {
			err = step.set(r)
		}
		if err == nil {
			err = unix.IoctlIfreq(fd, step.call, r)
		}
		if err != nil {
			return fmt.Errorf("set %s's %s: %w", name, step.what, err)
		}
	}
	if n.Gateway.IsValid() {
		if err := addRoute(fd, n.Gateway); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("route by %s: %w", n.Gateway, err)
		}
	}
	return nil
}

// setMAC changes the interface's MAC address.
func setMAC(fd int, device, text string) error {
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 {
		return fmt.Errorf("%q is no MAC address", text)
	}
	// struct ifreq: the name, then a struct sockaddr.
	var r struct {
		name   [unix.IFNAMSIZ]byte
		family uint16
		addr   [14]byte
		_      [8]byte
	}
	copy(r.name[:], device)
	r.family = unix.ARPHRD_ETHER
	copy(r.addr[:], mac)
	return ioctl(fd, unix.SIOCSIFHWADDR, unsafe.Pointer(&r))
}

// addRoute makes gateway the way to everywhere else.
func addRoute(fd int, gateway netip.Addr) error {
	type sockaddr struct {
		family uint16
		_      uint16
		addr   [4]byte
		_      [8]byte
	}
	// struct rtentry
	r := struct {
		_              uintptr
		dst, via, mask sockaddr
		flags          uint16
		_              int16
		_, _           uintptr
		_              int16
		_, _, _        uintptr // device, MTU, window
		_              uint16
	}{
		dst: sockaddr{family: unix.AF_INET}, mask: sockaddr{family: unix.AF_INET},
		via:   sockaddr{family: unix.AF_INET, addr: gateway.As4()},
		flags: unix.RTF_UP | unix.RTF_GATEWAY,
	}
	return ioctl(fd, unix.SIOCADDRT, unsafe.Pointer(&r))
}

func ioctl(fd int, call uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), call, uintptr(arg))
	runtime.KeepAlive(arg)
	if errno != 0 {
		return errno
	}
	return nil
}
