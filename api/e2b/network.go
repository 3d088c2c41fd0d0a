package e2b

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// Labels under which a sandbox's record keeps what only this API knows of it.
const (
	labelTemplate   = "e2b.template"          // the snapshot it was created from, as the client knows it
	labelInternet   = "e2b.internet"          // "true" when internet access was asked for by name
	labelMaskHost   = "e2b.mask-request-host" // the Host header that servers inside get to see
	labelHTTPSPorts = "e2b.https-ports"       // ports whose servers speak TLS, with commas
)

// maxRules bounds each list of a network configuration.
const maxRules = 1000

// networkConfig is the "network" of a creation, and with Internet the body of
// an update.
type networkConfig struct {
	AllowOut           []string         `json:"allowOut,omitempty"`
	DenyOut            []string         `json:"denyOut,omitempty"`
	AllowPublicTraffic *bool            `json:"allowPublicTraffic,omitempty"`
	MaskRequestHost    string           `json:"maskRequestHost,omitempty"`
	HTTPSPorts         []int            `json:"httpsPorts,omitempty"`
	EgressProxy        *struct{}        `json:"egressProxy,omitempty"`
	Rules              map[string][]any `json:"rules,omitempty"`
	Internet           *bool            `json:"allow_internet_access,omitempty"` // updates only
}

// allTraffic is how E2B's clients write "everything" in a list.
const allTraffic = "0.0.0.0/0"

// domainPattern is a host name or "*." and a host name.
var domainPattern = lazy(`^(\*\.)?([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?\.)+[a-zA-Z0-9-]{2,63}$`)

// policy turns the configuration into what the network enforces. internet is
// the "allow_internet_access" beside it; nil when it was not given.
func (c *networkConfig) policy(internet *bool) (sandbox.NetworkPolicy, error) {
	p := sandbox.NetworkPolicy{Internet: internet == nil || *internet}
	if c == nil {
		return p, nil
	}
	if len(c.AllowOut) > maxRules || len(c.DenyOut) > maxRules {
		return p, invalid("a network has at most %d rules of a kind", maxRules)
	}
	if c.EgressProxy != nil {
		return p, invalid("network.egressProxy is not supported by this server")
	}
	if len(c.Rules) > 0 {
		return p, invalid("network.rules is not supported by this server")
	}
	domains := false
	for _, e := range c.AllowOut {
		if isAddress(e) {
			continue
		}
		if !domainPattern().MatchString(e) {
			return p, invalid("allowOut entry %q is neither a CIDR block, an address nor a domain name", e)
		}
		domains = true
	}
	for _, e := range c.DenyOut {
		if !isAddress(e) {
			return p, invalid("denyOut entry %q is neither a CIDR block nor an address; domain names can only be allowed", e)
		}
	}
	all := slices.Contains(c.DenyOut, allTraffic)
	if domains && !all && p.Internet {
		return p, invalid("allowOut names domains, which limits nothing unless denyOut holds %s", allTraffic)
	}
	p.AllowOut, p.DenyOut = c.AllowOut, c.DenyOut
	if all {
		p.Internet = false // IPv6 too
	}
	return p, nil
}

func isAddress(s string) bool {
	if _, err := netip.ParseAddr(s); err == nil {
		return true
	}
	_, err := netip.ParsePrefix(s)
	return err == nil
}

// maskPattern is a host name with an optional port, where ${PORT} stands for
// the port addressed.
var maskPattern = lazy(`^[a-zA-Z0-9._-]{1,253}(:([0-9]{1,5}|\$\{PORT\}))?$`)

// labels are the options that this API itself looks after.
func (c *networkConfig) labels(internet *bool) (map[string]string, error) {
	m := make(map[string]string)
	if internet != nil && *internet {
		m[labelInternet] = "true"
	}
	if c == nil {
		return m, nil
	}
	if h := c.MaskRequestHost; h != "" {
		if !maskPattern().MatchString(h) {
			return nil, invalid("maskRequestHost %q is not a host name", h)
		}
		m[labelMaskHost] = h
	}
	ports := make([]string, 0, len(c.HTTPSPorts))
	for _, p := range c.HTTPSPorts {
		if p < 1 || p > 65535 || p == sandbox.GuestPort {
			return nil, invalid("httpsPorts cannot hold %d", p)
		}
		ports = append(ports, strconv.Itoa(p))
	}
	if len(ports) > 0 {
		m[labelHTTPSPorts] = strings.Join(ports, ",")
	}
	return m, nil
}

// maskedHost is the Host header for a request to port; empty to leave it as
// the client sent it.
func maskedHost(labels map[string]string, port int) string {
	return strings.ReplaceAll(labels[labelMaskHost], "${PORT}", strconv.Itoa(port))
}

// httpsPorts lists the ports whose servers inside speak TLS.
func httpsPorts(labels map[string]string) []int {
	var ports []int
	for s := range strings.SplitSeq(labels[labelHTTPSPorts], ",") {
		if n, err := strconv.Atoi(s); err == nil {
			ports = append(ports, n)
		}
	}
	return ports
}

// networkOf renders a sandbox's network as it was asked for.
func networkOf(p sandbox.NetworkPolicy, labels map[string]string, public bool) *networkConfig {
	return &networkConfig{
		AllowOut: p.AllowOut, DenyOut: p.DenyOut, AllowPublicTraffic: &public,
		MaskRequestHost: labels[labelMaskHost], HTTPSPorts: httpsPorts(labels),
	}
}

// internetOf tells whether internet access was asked for, forbidden, or (nil)
// not mentioned.
func internetOf(p sandbox.NetworkPolicy, labels map[string]string) *bool {
	yes, no := true, false
	switch {
	case !p.Internet && !slices.Contains(p.DenyOut, allTraffic):
		return &no
	case p.Internet && labels[labelInternet] == "true":
		return &yes
	}
	return nil
}
