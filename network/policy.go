package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	"golang.org/x/net/idna"

	"github.com/atoll-run/atoll/sandbox"
)

// maxEntries bounds each list of a policy, since every entry costs kernel memory.
const maxEntries = 1000

// protectedRanges are what no sandbox reaches unless AllowOut holds an entry
// that lies inside them: they lead to the host's own surroundings, never to the
// public internet.
var protectedRanges = []string{
	"0.0.0.0/8",        // this network
	"10.0.0.0/8",       // private
	"100.64.0.0/10",    // carrier-grade NAT, overlay networks, one cloud's metadata
	"127.0.0.0/8",      // loopback
	"168.63.129.16/32", // Azure's host agent, public only by its number
	"169.254.0.0/16",   // link-local, metadata of most clouds
	"172.16.0.0/12",    // private
	"192.0.0.0/24",     // protocol assignments, one cloud's metadata
	"192.168.0.0/16",   // private
	"198.18.0.0/15",    // benchmarks; the default pool lies here
	"224.0.0.0/4",      // multicast
	"240.0.0.0/4",      // reserved and broadcast
}

// rules is a policy compiled for one node. It is immutable.
type rules struct {
	addrs     *netipx.IPSet // what packets may be sent to without asking further
	protected *netipx.IPSet // what a name must never lead to, unless in addrs
	exact     []netip.Addr  // single addresses of AllowOut: they may name the host itself
	names     nameSet
	open      bool // names that no entry mentions may be resolved too
}

// compile turns a policy into rules. Addresses inside pool are protected too.
// It fails with Invalid for an entry that means nothing or that cannot be kept.
func compile(p sandbox.NetworkPolicy, pool netip.Prefix) (*rules, error) {
	const op = "network.policy"
	if len(p.AllowOut) > maxEntries || len(p.DenyOut) > maxEntries {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "more than %d entries", maxEntries)
	}
	if p.RateLimit != 0 && (p.RateLimit < minRate || p.RateLimit > maxRate) {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "a limit of %d bytes a second: %d to %d are possible", p.RateLimit, minRate, int64(maxRate))
	}
	protected, err := protectedSet(pool)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	r := &rules{protected: protected, names: nameSet{exact: map[string]bool{}, parent: map[string]bool{}}}

	var internet, allowed netipx.IPSetBuilder
	if p.Internet {
		internet.AddPrefix(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
		internet.RemoveSet(protected)
	}
	for _, entry := range p.DenyOut {
		prefix, ok := parsePrefix(entry)
		if !ok {
			return nil, sandbox.Errorf(op, sandbox.Invalid, entry, "not an address or a CIDR").
				WithHint("deny lists hold addresses only; to deny by name set internet to false and allow the names you need")
		}
		if prefix.Addr().Is4() { // all of IPv6 is denied anyway
			internet.RemovePrefix(prefix)
		}
	}
	for _, entry := range p.AllowOut {
		if prefix, ok := parsePrefix(entry); ok {
			if !prefix.Addr().Is4() {
				return nil, sandbox.Errorf(op, sandbox.Invalid, entry, "sandboxes have no IPv6")
			}
			r.allow(&allowed, prefix)
			continue
		}
		if err := r.names.add(entry); err != nil {
			return nil, sandbox.E(op, sandbox.Invalid, entry, err).WithHint("use an address, a CIDR, a domain or *.domain")
		}
	}
	rest, err := internet.IPSet()
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	r.open = len(rest.Ranges()) > 0
	allowed.AddSet(rest)
	if r.addrs, err = allowed.IPSet(); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	return r, nil
}

// allow adds one entry of AllowOut. A wide entry such as 0.0.0.0/0 does not
// name the protected addresses that it happens to cover; an entry that covers
// nothing else does.
func (r *rules) allow(b *netipx.IPSetBuilder, entry netip.Prefix) {
	if entry.IsSingleIP() && !slices.Contains(r.exact, entry.Addr()) {
		r.exact = append(r.exact, entry.Addr())
	}
	if r.protected.ContainsPrefix(entry) {
		b.AddPrefix(entry)
		return
	}
	var outside netipx.IPSetBuilder
	outside.AddPrefix(entry)
	outside.RemoveSet(r.protected)
	set, err := outside.IPSet()
	if err == nil { // fails only for prefixes that parsePrefix refuses
		b.AddSet(set)
	}
}

// decideAddr reports whether packets to addr may leave the sandbox as they are.
func (r *rules) decideAddr(addr netip.Addr) bool { return r.addrs.Contains(addr) }

// decideHost reports whether addr may be reached even though it is this host's.
func (r *rules) decideHost(addr netip.Addr) bool { return slices.Contains(r.exact, addr) }

// decideName reports whether the sandbox may resolve name and speak to it. The
// name is as a client wrote it; one that is no valid domain is denied.
func (r *rules) decideName(name string) bool {
	name, err := normalName(name)
	return err == nil && (r.open || r.names.has(name))
}

// decide reports whether name may lead to addr. A name of the policy may lead
// anywhere but into protected ranges, so that whoever controls the name's zone
// cannot point it at the host's surroundings.
func (r *rules) decide(name string, addr netip.Addr) bool {
	if !r.decideName(name) || !addr.Is4() {
		return false
	}
	if r.addrs.Contains(addr) {
		return true
	}
	name, err := normalName(name)
	return err == nil && r.names.has(name) && !r.protected.Contains(addr)
}

// proxied reports whether web traffic to addresses outside addrs is to be
// judged by name.
func (r *rules) proxied() bool { return !r.names.empty() }

func protectedSet(pool netip.Prefix) (*netipx.IPSet, error) {
	var b netipx.IPSetBuilder
	for _, s := range protectedRanges {
		b.AddPrefix(netip.MustParsePrefix(s))
	}
	b.AddPrefix(pool)
	return b.IPSet()
}

// parsePrefix reads an address or a CIDR; host bits of a CIDR are ignored.
func parsePrefix(s string) (netip.Prefix, bool) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, false
	}
	return p.Masked(), true
}

// nameSet holds domain entries: exact names and, under parent, the D of "*.D".
// The entry "*" is the parent "".
type nameSet struct {
	exact, parent map[string]bool
}

func (s nameSet) empty() bool { return len(s.exact) == 0 && len(s.parent) == 0 }

func (s nameSet) add(entry string) error {
	if entry == "*" {
		s.parent[""] = true
		return nil
	}
	set, name := s.exact, entry
	if rest, ok := strings.CutPrefix(entry, "*."); ok {
		set, name = s.parent, rest
	}
	ascii, err := idna.Lookup.ToASCII(strings.TrimSuffix(name, "."))
	if err != nil {
		return fmt.Errorf("not a domain: %w", err)
	}
	if ascii, err = normalName(ascii); err != nil {
		return err
	}
	if label := ascii[strings.LastIndexByte(ascii, '.')+1:]; strings.Trim(label, "0123456789") == "" {
		return fmt.Errorf("neither an address nor a domain")
	}
	set[ascii] = true
	return nil
}

// has reports whether a normal name is in the set: as itself, or below a parent
// at any depth. A parent does not contain itself.
func (s nameSet) has(name string) bool {
	if s.exact[name] || s.parent[""] {
		return true
	}
	for {
		_, rest, ok := strings.Cut(name, ".")
		if !ok {
			return false
		}
		if s.parent[rest] {
			return true
		}
		name = rest
	}
}

// normalName returns name in lower case without its final dot, or an error if
// it is not a domain name of letters, digits, hyphens and underscores.
func normalName(name string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" || len(name) > 253 {
		return "", fmt.Errorf("a domain has 1 to 253 characters")
	}
	label := 0
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if label == 0 || label > 63 {
				return "", fmt.Errorf("a label of a domain has 1 to 63 characters")
			}
			label = 0
			continue
		}
		c := name[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return "", fmt.Errorf("character %q does not belong into a domain", c)
		}
		label++
	}
	return name, nil
}
