package network

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// denied picks connections that the kernel is to forget: those from an address
// to places that rules do not allow, except those that this process carries.
// Without rules, all that have to do with the address.
type denied struct {
	from    netip.Addr
	carrier netip.Addr // where resolver and proxy listen
	rules   *rules
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (d denied) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, _ := netip.AddrFromSlice(f.Forward.SrcIP.To4())
	dst, _ := netip.AddrFromSlice(f.Forward.DstIP.To4())
	if d.rules == nil {
		return src == d.from || dst == d.from
	}
	answers, _ := netip.AddrFromSlice(f.Reverse.SrcIP.To4())
	return src == d.from && answers != d.carrier && !d.rules.decideAddr(dst)
}

// forget drops connections from the kernel's table. Without it, what the other
// side sends would go on arriving.
func forget(d denied) error {
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, d)
	return err
}
