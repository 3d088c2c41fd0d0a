package network

import (
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// limits reads the limits of a link's two ends, in bytes per second; 0: none.
func limits(t *testing.T, link sandbox.Link) (out [2]uint64) {
	t.Helper()
	ns, err := netns.GetFromPath(link.NetNS)
	must(t, err)
	defer ns.Close()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	must(t, err)
	defer inside.Close()
	for i, end := range []struct {
		h    *netlink.Handle
		name string
	}{{new(netlink.Handle), block(link.Address.Masked()).device()}, {inside, guestLink}} {
		dev, err := end.h.LinkByName(end.name)
		must(t, err)
		queues, err := end.h.QdiscList(dev)
		must(t, err)
		for _, q := range queues {
			if tbf, ok := q.(*netlink.Tbf); ok {
				out[i] = tbf.Rate
			}
		}
	}
	return out
}

// conformance: FR2.5
func TestALimitOfTrafficHoldsBothWaysUntilItIsLifted(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "rate", nil)
	const slow, fast = 1 << 20, 6_000_000_000
	link := attach(t, n, "one", sandbox.NetworkPolicy{RateLimit: slow})
	for _, want := range []uint64{slow, fast, fast, 0, 0, slow} {
		must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{RateLimit: int64(want)}))
		if got := limits(t, link); got != [2]uint64{want, want} {
			t.Errorf("the limits are %d, want %d", got, want)
		}
	}
	must(t, n.Detach(t.Context(), "one"))
	if got := limits(t, attach(t, n, "two", open)); got != [2]uint64{} {
		t.Errorf("the next sandbox has limits of %d", got)
	}
}
