package network

import (
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

const helperEnv = "ATOLL_NETWORK_TEST_HELPER"

func helper(string) int { return 1 }

func TestSmoke(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":7000", "a")
	greet(t, w.ns, privateAddr+":7000", "private")
	greet(t, "/proc/self/ns/net", hostAddr+":7000", "host")
	l, err := n.Attach(t.Context(), "one", sandbox.NetworkPolicy{Internet: true})
	must(t, err)
	t.Log(greeting(t, l.NetNS, siteA+":7000"))
	t.Log(greeting(t, l.NetNS, privateAddr+":7000"))
	t.Log(greeting(t, l.NetNS, hostAddr+":7000"))
	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{Internet: true, AllowOut: []string{"10.0.0.0/8", hostAddr}}))
	t.Log(greeting(t, l.NetNS, privateAddr+":7000"))
	t.Log(greeting(t, l.NetNS, hostAddr+":7000"))
	t.Log(n.Stats("one"))
}
