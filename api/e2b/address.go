package e2b

import (
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// address is where a data-plane request goes: a port inside a sandbox.
type address struct {
	id   string
	port int
}

// Headers by which the SDKs address a sandbox when the host name cannot.
const (
	headerSandbox = "E2b-Sandbox-Id"
	headerPort    = "E2b-Sandbox-Port"
)

// addressOf finds the sandbox that a request is meant for. The host name beats
// the headers, since the SDKs send headers that always name envd's port.
func addressOf(r *http.Request) (address, bool) {
	if a, ok := parseHost(r.Host); ok {
		return a, true
	}
	id := shortID(r.Header.Get(headerSandbox))
	if !sandbox.ValidID(id) {
		return address{}, false
	}
	port := sandbox.GuestPort
	if p := r.Header.Get(headerPort); p != "" {
		var ok bool
		if port, ok = parsePort(p); !ok {
			return address{}, false
		}
	}
	return address{id: id, port: port}, true
}

// IsTraffic reports whether the request is for a sandbox rather than for the
// API, whatever its path.
func IsTraffic(r *http.Request) bool {
	_, ok := addressOf(r)
	return ok
}

// parseHost reads "{port}-{id}.{domain}" and the older
// "{port}-{id}-{client}.{domain}", with or without a port after the domain.
// Any domain is taken: what a proxy in front of the node is called is its own
// business, and the ID decides.
func parseHost(host string) (address, bool) {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	label, domain, ok := strings.Cut(host, ".")
	if !ok || domain == "" {
		return address{}, false
	}
	p, id, ok := strings.Cut(label, "-")
	if !ok {
		return address{}, false
	}
	port, ok := parsePort(p)
	if !ok {
		return address{}, false
	}
	// Host names are case-insensitive, IDs are lower case.
	id = shortID(strings.ToLower(id))
	if !sandbox.ValidID(id) {
		return address{}, false
	}
	return address{id: id, port: port}, true
}

// shortID drops the client part that SDKs before version 1.4 append to an ID.
func shortID(id string) string {
	id, _, _ = strings.Cut(id, "-")
	return id
}

func parsePort(s string) (int, bool) {
	if len(s) > 5 || s == "" || s[0] == '+' || s[0] == '-' {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil && n > 0 && n < 1<<16
}
