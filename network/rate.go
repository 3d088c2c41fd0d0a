package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The bounds of a limit of traffic, in bytes per second: with less, a handshake
// takes longer than most programs wait, and more is none.
const (
	minRate = 8 << 10
	maxRate = 12_500_000_000
)

// limit lets the sandbox send rate bytes a second and receive as many; 0 lifts the
// limit. What is received is held up on the host's end, and what is sent on the
// other, which no sandbox can reach: it has a kernel of its own, or not the right.
func (l *links) limit(b block, rate int64) error {
	if err := shape(new(netlink.Handle), b.device(), rate); err != nil {
		return err
	}
	ns, err := os.Open(l.netns(b))
	if err != nil {
		return err
	}
	defer ns.Close()
	inside, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inside.Close()
	return shape(inside, guestLink, rate)
}

// shape bounds what leaves by a device, in bytes per second, by a token bucket. It
// passes 20 ms of traffic at once and holds 100 ms more before it drops packets,
// and of both never less than one large segment takes.
func shape(h *netlink.Handle, device string, rate int64) error {
	link, err := h.LinkByName(device)
	if err != nil {
		return err
	}
	const segment = 68 << 10
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if rate == 0 {
		err := h.QdiscDel(&netlink.Tbf{QdiscAttrs: attrs})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // there is none
			return nil
		}
		return err
	}
	burst := max(rate/50, segment)
	err = h.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: attrs, Rate: uint64(rate),
		Buffer: netlink.Xmittime(uint64(rate), uint32(burst)), Limit: uint32(burst + max(rate/10, segment)),
	})
	if err != nil {
		return fmt.Errorf("limit the traffic of %s: %w", device, err)
	}
	return nil
}
