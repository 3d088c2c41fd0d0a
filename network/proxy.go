package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	httpPort     = 80
	httpsPort    = 443
	helloTimeout = 10 * time.Second // for a client to name its server
	dialTimeout  = 10 * time.Second
	maxDialed    = 4 // addresses of one name that are tried
)

var (
	errDenied    = errors.New("the sandbox's network policy does not allow it")
	alertUnknown = []byte{21, 3, 1, 0, 2, 2, 112} // TLS: fatal, unrecognized_name
)

const refusal = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n" +
	"The network policy of this sandbox does not allow this host.\n"

// serveProxyConn carries one connection that the firewall diverted here. It goes
// to an address of the name that the client asked for, looked up by us: the
// address that the client dialed says nothing about the name.
func (s *service) serveProxyConn(ctx context.Context, a *attachment, f *flow, client *net.TCPConn) {
	if err := client.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return
	}
	wanted, err := originalDestination(client)
	if err != nil {
		return
	}
	var name string
	var head []byte
	denial := alertUnknown
	switch wanted.Port() {
	case httpPort:
		denial = []byte(refusal)
		name, head, err = readHost(client)
	case httpsPort:
		name, head, err = readServerName(client)
	default:
		return // dialed our address directly
	}
	var server *net.TCPConn
	if err == nil {
		server, err = s.dial(ctx, a, f, name, wanted)
	}
	if err != nil {
		s.n.log.Debug("web connection refused", "id", a.ID, "name", name, "to", wanted, "err", err)
		_, _ = client.Write(denial) // the client may be gone
		return
	}
	defer server.Close()
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if client.SetReadDeadline(time.Time{}) != nil {
		return
	}
	if _, err := server.Write(head); err != nil {
		return
	}
	join(client, server)
}

// dial connects to the name that a client asked for, if the rules allow it, and
// notes in f what was decided.
func (s *service) dial(ctx context.Context, a *attachment, f *flow, name string, wanted netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	name, err := normalName(name)
	if err != nil {
		return nil, err
	}
	if !a.rules.Load().decideName(name) {
		return nil, errDenied
	}
	found, err := s.n.resolver.lookup(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("resolving: %w", err)
	}
	err = errDenied
	for _, addr := range prefer(found, wanted.Addr(), maxDialed) {
		if !reachable(a.rules.Load(), name, addr) {
			continue
		}
		var d net.Dialer
		conn, dialErr := d.DialContext(ctx, "tcp4", netip.AddrPortFrom(addr, wanted.Port()).String())
		if dialErr != nil {
			err = dialErr
			continue
		}
		server := conn.(*net.TCPConn)
		a.flows.settle(f, name, addr)
		// The policy may have changed meanwhile: either Update sees the settled
		// flow, or this sees the new rules.
		if !reachable(a.rules.Load(), name, addr) {
			server.Close()
			return nil, errDenied
		}
		return server, nil
	}
	return nil, err
}

// reachable reports whether name may lead to addr. An address of the host itself
// must be allowed as such, even when it is a public one.
func reachable(r *rules, name string, addr netip.Addr) bool {
	if !r.decide(name, addr) {
		return false
	}
	local, err := isLocal(addr)
	return err == nil && (!local || r.decideHost(addr))
}

// prefer puts the address that the client chose first, if it is one of the
// name's, and keeps at most n.
func prefer(found []netip.Addr, chosen netip.Addr, n int) []netip.Addr {
	for i, addr := range found {
		if addr == chosen {
			found[0], found[i] = found[i], found[0]
		}
	}
	return found[:min(len(found), n)]
}

// join copies both ways until both sides have ended or one has failed. The
// copying is done by the kernel.
func join(a, b *net.TCPConn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		half(a, b)
	}()
	half(b, a)
	<-done
}

// half copies one direction. After an error neither side can go on.
func half(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	_ = to.CloseWrite() // fails only when the other half has closed it
}

// originalDestination asks the kernel where a diverted connection was going.
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var mreq *unix.IPv6Mreq // its first 16 bytes take the sockaddr_in
	if ctlErr := raw.Control(func(fd uintptr) {
		mreq, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST)
	}); ctlErr != nil {
		return netip.AddrPort{}, ctlErr
	}
	if err != nil {
		return netip.AddrPort{}, err
	}
	addr := netip.AddrFrom4([4]byte(mreq.Multiaddr[4:8]))
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(mreq.Multiaddr[2:4])), nil
}
