package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	dnsPort   = 10053 // preferred, so that a restarted process listens where the last one did
	proxyPort = 10080
	maxFlows  = 4096 // TCP connections that this process carries
	ownFlows  = 512  // of one sandbox
)

// service is what this process does for sandboxes: it answers names and carries
// web traffic that is judged by name. The sender of a packet is known by its
// address, since the firewall lets no forged one pass.
type service struct {
	n        *Network
	at       services
	slotsUDP chan struct{} // DNS packets being answered
	slotsTCP chan struct{} // TCP connections being carried
	running  sync.WaitGroup
}

// serve listens on addr until ctx ends.
func serve(ctx context.Context, n *Network, addr netip.Addr) (*service, error) {
	s := &service{n: n, slotsUDP: make(chan struct{}, maxQueries), slotsTCP: make(chan struct{}, maxFlows)}
	var closers []func() error
	fail := func(err error) (*service, error) {
		for _, c := range closers {
			_ = c()
		}
		return nil, err
	}
	dns, err := listen(netip.AddrPortFrom(addr, dnsPort))
	if err != nil {
		return fail(err)
	}
	closers = append(closers, dns.Close)
	s.at.dns = dns.Addr().(*net.TCPAddr).AddrPort()
	packets, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(s.at.dns))
	if err != nil {
		return fail(err)
	}
	closers = append(closers, packets.Close)
	proxy, err := listen(netip.AddrPortFrom(addr, proxyPort))
	if err != nil {
		return fail(err)
	}
	closers = append(closers, proxy.Close)
	s.at.proxy = proxy.Addr().(*net.TCPAddr).AddrPort()

	context.AfterFunc(ctx, func() { _, _ = fail(nil) })
	s.running.Go(func() { s.serveUDP(ctx, packets) })
	s.running.Go(func() { s.accept(ctx, dns, s.serveDNSConn) })
	s.running.Go(func() { s.accept(ctx, proxy, s.serveProxyConn) })
	return s, nil
}

// listen takes any free port when the preferred one is in use.
func listen(at netip.AddrPort) (*net.TCPListener, error) {
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if errors.Is(err, unix.EADDRINUSE) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at.Addr(), 0)))
	}
	return l, err
}

// wait returns when everything has ended. The context must have ended before.
func (s *service) wait() { s.running.Wait() }

// accept hands connections of known sandboxes to handle, each in a goroutine of
// its own, and closes them when it returns.
func (s *service) accept(ctx context.Context, l *net.TCPListener, handle func(context.Context, *attachment, *flow, *net.TCPConn)) {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			if !rest(ctx) {
				return
			}
			continue
		}
		a := s.n.sender(conn.RemoteAddr().(*net.TCPAddr).AddrPort())
		f := &flow{close: func() { conn.Close() }}
		if a == nil || !s.admit(a, f) {
			conn.Close()
			continue
		}
		s.running.Go(func() {
			stop := context.AfterFunc(ctx, f.close)
			defer func() { stop(); conn.Close(); a.flows.drop(f); <-s.slotsTCP }()
			handle(ctx, a, f, conn)
		})
	}
}

// rest waits a moment after an error such as a lack of file descriptors. It
// reports false once ctx has ended.
func rest(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(10 * time.Millisecond):
		return true
	}
}

// admit takes a place for one more connection of a.
func (s *service) admit(a *attachment, f *flow) bool {
	select {
	case s.slotsTCP <- struct{}{}:
	default:
		return false
	}
	if !a.flows.add(f) {
		<-s.slotsTCP
		return false
	}
	return true
}

// sender returns the attachment that a packet came from, or nil.
func (n *Network) sender(from netip.AddrPort) *attachment {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.byAddr[from.Addr().Unmap()]
}

// flow is one TCP connection that this process carries. While name is empty
// nothing has been decided about it.
type flow struct {
	name  string
	addr  netip.Addr
	close func()
}

// flows are those of one sandbox.
type flows struct {
	mu     sync.Mutex
	open   map[*flow]bool
	closed bool // the sandbox is gone
}

func (s *flows) add(f *flow) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.open) >= ownFlows {
		return false
	}
	if s.open == nil {
		s.open = map[*flow]bool{}
	}
	s.open[f] = true
	return true
}

func (s *flows) drop(f *flow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, f)
}

// cut closes the decided flows that match.
func (s *flows) cut(match func(*flow) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.open {
		if f.name != "" && match(f) {
			f.close()
		}
	}
}

// end closes all flows and lets no new ones begin.
func (s *flows) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for f := range s.open {
		f.close()
	}
}

// settle notes what was decided about a flow.
func (s *flows) settle(f *flow, name string, addr netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.name, f.addr = name, addr
}
