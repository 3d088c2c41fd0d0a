package network

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

// slowDecide says what a policy means for an address, entry by entry, as the
// comment of sandbox.NetworkPolicy has it.
func slowDecide(p sandbox.NetworkPolicy, pool netip.Prefix, addr netip.Addr) bool {
	guarded := []netip.Prefix{pool}
	for _, s := range protectedRanges {
		guarded = append(guarded, netip.MustParsePrefix(s))
	}
	protected := false
	for _, g := range guarded {
		protected = protected || g.Contains(addr)
	}
	for _, entry := range p.AllowOut {
		prefix, ok := parsePrefix(entry)
		if !ok || !prefix.Contains(addr) {
			continue
		}
		if !protected {
			return true
		}
		if covered(prefix, guarded) {
			return true // the entry names protected addresses
		}
	}
	for _, entry := range p.DenyOut {
		if prefix, ok := parsePrefix(entry); ok && prefix.Contains(addr) {
			return false
		}
	}
	return p.Internet && !protected
}

// covered reports whether every address of p lies in one of ranges.
func covered(p netip.Prefix, ranges []netip.Prefix) bool {
	touched := false
	for _, r := range ranges {
		if r.Bits() <= p.Bits() && r.Contains(p.Addr()) {
			return true
		}
		touched = touched || r.Overlaps(p)
	}
	if !touched || p.Bits() == 32 {
		return false
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	raw := p.Addr().As4()
	raw[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	high := netip.PrefixFrom(netip.AddrFrom4(raw), p.Bits()+1)
	return covered(low, ranges) && covered(high, ranges)
}

func TestDecisionsByAddressAgreeWithTheSlowReference(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	anchors := []string{"8.8.8.0", "10.1.2.0", "169.254.169.254", "100.64.0.0", "198.19.0.4", "203.0.113.9", "255.255.255.255", "0.0.0.0", "168.63.129.16", "172.16.0.0", "223.255.255.255"}
	// Addresses cluster around a few, so that random entries meet random probes.
	near := func() netip.Addr {
		a := netip.MustParseAddr(anchors[rng.IntN(len(anchors))]).As4()
		a[3] += byte(rng.IntN(5)) - 2
		if rng.IntN(4) == 0 {
			a[2] += byte(rng.IntN(3)) - 1
		}
		return netip.AddrFrom4(a)
	}
	entries := func() []string {
		var out []string
		for range rng.IntN(5) {
			out = append(out, netip.PrefixFrom(near(), rng.IntN(33)).String())
		}
		return out
	}
	for range 3000 {
		p := sandbox.NetworkPolicy{Internet: rng.IntN(2) == 0, AllowOut: entries(), DenyOut: entries()}
		r, err := compile(p, DefaultPool)
		must(t, err)
		for range 40 {
			addr := near()
			if got, want := r.decideAddr(addr), slowDecide(p, DefaultPool, addr); got != want {
				t.Fatalf("%+v: %s: got %v, want %v", p, addr, got, want)
			}
		}
	}
}

// slowName matches a name against entries, label by label.
func slowName(entries []string, name string) bool {
	labels := strings.Split(name, ".")
	for _, e := range entries {
		if e == "*" || e == name {
			return true
		}
		if rest, ok := strings.CutPrefix(e, "*."); ok {
			tail := strings.Split(rest, ".")
			if len(labels) > len(tail) && strings.Join(labels[len(labels)-len(tail):], ".") == rest {
				return true
			}
		}
	}
	return false
}

func TestDecisionsByNameAgreeWithTheSlowReference(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	name := func() string {
		labels := make([]string, 1+rng.IntN(4))
		for i := range labels {
			labels[i] = string(rune('a' + rng.IntN(3)))
		}
		return strings.Join(labels, ".")
	}
	for range 3000 {
		var entries []string
		for range rng.IntN(4) {
			switch rng.IntN(8) {
			case 0:
				entries = append(entries, "*")
			case 1, 2, 3:
				entries = append(entries, "*."+name())
			default:
				entries = append(entries, name())
			}
		}
		r, err := compile(sandbox.NetworkPolicy{AllowOut: entries}, DefaultPool)
		must(t, err)
		for range 20 {
			n := name()
			spelled := n
			if rng.IntN(2) == 0 {
				spelled = strings.ToUpper(n) + "."
			}
			if got, want := r.decideName(spelled), slowName(entries, n); got != want {
				t.Fatalf("%v: %q: got %v, want %v", entries, spelled, got, want)
			}
		}
	}
}

func TestNamesNeverLeadIntoProtectedRanges(t *testing.T) {
	r, err := compile(sandbox.NetworkPolicy{AllowOut: []string{"good.example", "10.1.0.0/16"}, DenyOut: []string{"0.0.0.0/0"}}, DefaultPool)
	must(t, err)
	for _, c := range []struct {
		name, addr string
		want       bool
	}{
		{"good.example", "93.184.216.34", true}, // an allowed name beats the deny list
		{"good.example", "10.2.0.1", false},
		{"good.example", "10.1.0.1", true}, // that private range is allowed as such
		{"good.example", "169.254.169.254", false},
		{"good.example", "198.19.0.6", false},
		{"good.example", "::1", false},
		{"bad.example", "93.184.216.34", false},
		{"bad.example", "10.1.0.1", false},
	} {
		if got := r.decide(c.name, netip.MustParseAddr(c.addr)); got != c.want {
			t.Errorf("%s at %s: got %v", c.name, c.addr, got)
		}
	}
}

func TestNamesThatNoEntryMentionsResolveOnlyWhereTheInternetIsOpen(t *testing.T) {
	for _, c := range []struct {
		policy sandbox.NetworkPolicy
		want   bool
	}{
		{sandbox.NetworkPolicy{Internet: true}, true},
		{sandbox.NetworkPolicy{Internet: true, DenyOut: []string{"8.0.0.0/8"}}, true},
		{sandbox.NetworkPolicy{Internet: true, DenyOut: []string{"0.0.0.0/0"}}, false},
		{sandbox.NetworkPolicy{Internet: true, DenyOut: []string{"0.0.0.0/1", "128.0.0.0/1"}}, false},
		{sandbox.NetworkPolicy{}, false},
		{sandbox.NetworkPolicy{AllowOut: []string{"8.8.8.8"}}, false}, // names would carry data out
	} {
		r, err := compile(c.policy, DefaultPool)
		must(t, err)
		if got := r.decideName("some.example"); got != c.want {
			t.Errorf("%+v: got %v", c.policy, got)
		}
	}
}

func TestPoliciesThatMeanNothingAreRefused(t *testing.T) {
	many := make([]string, maxEntries+1)
	for i := range many {
		many[i] = fmt.Sprintf("h%d.example", i)
	}
	for _, p := range []sandbox.NetworkPolicy{
		{AllowOut: []string{""}},
		{AllowOut: []string{"1.2.3.4/33"}},
		{AllowOut: []string{"1.2.3.400"}},
		{AllowOut: []string{"*.*.example"}},
		{AllowOut: []string{"a..b"}},
		{AllowOut: []string{"http://a.example/"}},
		{AllowOut: []string{"exa mple.com"}},
		{AllowOut: []string{"2001:db8::/32"}},
		{AllowOut: []string{strings.Repeat("a", 64) + ".example"}},
		{AllowOut: many},
		{DenyOut: []string{"evil.example"}},
	} {
		if _, err := compile(p, DefaultPool); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%.80v: got %v", p, err)
		}
	}
}

func TestEntriesAreReadAsPeopleWriteThem(t *testing.T) {
	r, err := compile(sandbox.NetworkPolicy{
		AllowOut: []string{"Example.COM.", "*.Bücher.example", "::ffff:9.9.9.9", "8.8.8.8/24"},
		DenyOut:  []string{"::/0"},
	}, DefaultPool)
	must(t, err)
	for _, name := range []string{"example.com", "www.xn--bcher-kva.example"} {
		if !r.decideName(name) {
			t.Errorf("%s is denied", name)
		}
	}
	for _, addr := range []string{"9.9.9.9", "8.8.8.200"} {
		if !r.decideAddr(netip.MustParseAddr(addr)) {
			t.Errorf("%s is denied", addr)
		}
	}
	if r.decideName("bücher.example") || r.decideName("xn--bcher-kva.example") {
		t.Error("a wildcard contains its own domain")
	}
}

func FuzzPolicyEntry(f *testing.F) {
	for _, s := range []string{"1.2.3.4", "10.0.0.0/8", "*.example.com", "*", "::/0", "bücher.example", "1.2.3.4/0", "."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, entry string) {
		r, err := compile(sandbox.NetworkPolicy{AllowOut: []string{entry}}, DefaultPool)
		if err != nil {
			return
		}
		for _, host := range []string{"169.254.169.254", "10.0.0.1", "198.19.0.6", "127.0.0.1"} {
			addr := netip.MustParseAddr(host)
			prefix, isPrefix := parsePrefix(entry)
			if r.decide("a.example", addr) && (!isPrefix || !r.protected.ContainsPrefix(prefix)) {
				t.Fatalf("%q lets a sandbox reach %s", entry, host)
			}
		}
	})
}

func TestALimitOfTrafficThatNobodyCouldUseIsRefused(t *testing.T) {
	for _, rate := range []int64{-1, 1, minRate - 1, maxRate + 1} {
		if _, err := compile(sandbox.NetworkPolicy{RateLimit: rate}, DefaultPool); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%d bytes a second: %v", rate, err)
		}
	}
}
