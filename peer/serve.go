package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	idleTimeout  = 10 * time.Minute // without a request
	helloTimeout = 10 * time.Second // for the first byte and the handshake: a slow client must not hold a slot for ever
	maxHellos    = 512              // connections of which it is not known yet what they are

	streamBuffer = 8 << 20  // bytes under way on one stream: 600 Mbit/s at 100 ms
	flowBuffer   = 32 << 20 // bytes under way on one connection
	maxStreams   = 64

	// Of requests that last there may be many, and little is under way on each.
	lastingBuffer = 256 << 10
	maxLasting    = 1024
)

// Split returns a listener of those connections of ln that are not a peer's; these are served by the group. With public,
// all others are TLS by that configuration; without, they are not encrypted.
func (g *Group) Split(ln net.Listener, public *tls.Config) net.Listener {
	s := &splitter{Listener: ln, group: g, public: public, others: make(chan net.Conn), ended: make(chan struct{}), hellos: make(chan struct{}, maxHellos)}
	go s.run()
	return s
}

type splitter struct {
	net.Listener
	group  *Group
	public *tls.Config // nil: others are plain
	others chan net.Conn
	hellos chan struct{} // one for each connection that says hello

	once  sync.Once
	ended chan struct{} // closed when the listener ends
	err   error         // why; set before
}

func (s *splitter) end(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.ended)
	})
}

func (s *splitter) run() {
	for {
		c, err := s.Listener.Accept()
		if err != nil {
			var passing net.Error
			if errors.As(err, &passing) && passing.Timeout() {
				continue
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				time.Sleep(10 * time.Millisecond) // others close theirs meanwhile
				continue
			}
			s.end(err)
			return
		}
		select {
		case s.hellos <- struct{}{}:
			go func() {
				defer func() { <-s.hellos }()
				s.sort(c)
			}()
		default:
			_ = c.Close() // so many that say nothing are an attack
		}
	}
}

// Accept implements net.Listener.
func (s *splitter) Accept() (net.Conn, error) {
	select {
	case c := <-s.others:
		return c, nil
	case <-s.ended:
		return nil, s.err
	}
}

// Close implements net.Listener.
func (s *splitter) Close() error {
	s.end(net.ErrClosed)
	return s.Listener.Close()
}

// sort finds out what a connection is and hands it on.
func (s *splitter) sort(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(helloTimeout))
	first, err := peek(c)
	if err != nil {
		_ = c.Close()
		return
	}
	const handshakeRecord = 0x16
	if first != handshakeRecord {
		if s.public != nil {
			c = tls.Server(c, s.public) // the HTTP server tells the client what is wrong
		}
		s.pass(c)
		return
	}
	conn := tls.Server(c, &tls.Config{GetConfigForClient: s.config})
	if err := conn.HandshakeContext(context.Background()); err != nil { // the deadline bounds it
		_ = c.Close()
		return
	}
	switch conn.ConnectionState().NegotiatedProtocol {
	case protocol, protocolStreams:
		_ = c.SetDeadline(time.Time{})
		go s.group.serve(conn)
	case protocolTurned:
		_ = c.SetDeadline(time.Time{})
		s.group.accept(conn)
	default:
		s.pass(conn)
	}
}

// pass hands a connection to the HTTP server.
func (s *splitter) pass(c net.Conn) {
	_ = c.SetDeadline(time.Time{})
	select {
	case s.others <- c:
	case <-s.ended:
		_ = c.Close()
	}
}

var protocols = []string{protocol, protocolTurned, protocolStreams}

// config chooses by the client's protocols.
func (s *splitter) config(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	switch {
	case slices.ContainsFunc(hello.SupportedProtos, func(p string) bool { return slices.Contains(protocols, p) }):
		if tcp, ok := hello.Conn.(*net.TCPConn); ok {
			if raw, err := tcp.SyscallConn(); err == nil {
				tune(raw)
			}
		}
		return &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: protocols, Certificates: []tls.Certificate{s.group.cfg.Cert},
			ClientAuth: tls.RequireAnyClientCert, // one that is not known may still join
			VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
				if len(raw) != 2 {
					return errors.New("a leaf and its authority are needed")
				}
				return nil
			},
			SessionTicketsDisabled: true,
		}, nil
	case s.public != nil:
		return s.public, nil
	}
	return nil, errors.New("this port speaks plain HTTP")
}

// peek returns the first byte of a connection without taking it.
func peek(c net.Conn) (byte, error) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return 0, errors.New("not TCP")
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0, err
	}
	var buf [1]byte
	var n int
	var failed error
	if err := raw.Read(func(fd uintptr) bool {
		n, _, failed = unix.Recvfrom(int(fd), buf[:], unix.MSG_PEEK)
		return failed != unix.EAGAIN && failed != unix.EINTR
	}); err != nil {
		return 0, err
	}
	if failed == nil && n == 0 {
		failed = net.ErrClosed
	}
	return buf[0], failed
}

// serve answers what the other end of a connection asks, until it ends.
func (g *Group) serve(conn *tls.Conn) {
	//nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	srv := &http2.Server{MaxUploadBufferPerConnection: flowBuffer, MaxUploadBufferPerStream: streamBuffer, MaxConcurrentStreams: maxStreams,
		ReadIdleTimeout: aliveInterval, PingTimeout: aliveTimeout, IdleTimeout: idleTimeout}
	if conn.ConnectionState().NegotiatedProtocol == protocolStreams {
		srv.MaxUploadBufferPerStream, srv.MaxConcurrentStreams = lastingBuffer, maxLasting //nolint:staticcheck // as above
	}
	srv.ServeConn(conn, &http2.ServeConnOpts{Handler: http.HandlerFunc(g.answer)}) //nolint:staticcheck // as above
	_ = conn.Close()
}

// accept takes over a connection on which this node may ask.
func (g *Group) accept(conn *tls.Conn) {
	_, p, known, err := g.recognise(conn.ConnectionState().PeerCertificates)
	if err != nil || !known {
		_ = conn.Close()
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.turned[p.ID]
	if l == nil || l.Flows() == 0 {
		l = g.newLink(p)
		g.turned[p.ID] = l
	}
	_ = l.add(conn) // it is closed then
}

type fromKey struct{}

// From returns the peer that makes a request.
func From(ctx context.Context) Peer {
	p, _ := ctx.Value(fromKey{}).(Peer)
	return p
}

// answer lets peers ask everything, and all others join.
func (g *Group) answer(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == joinPath && r.Method == http.MethodPost {
		g.serveJoin(w, r)
		return
	}
	// Each request is looked at anew: the peer may have been forgotten since it connected.
	_, p, known, err := g.recognise(r.TLS.PeerCertificates)
	if err != nil || !known {
		Fail(w, sandbox.Errorf("peer.Serve", sandbox.Denied, "", "this node does not know you").WithHint("join again with `atoll node join`"))
		return
	}
	if r.URL.Path == alivePath {
		Answer(w, alive{ID: g.id, Name: g.cfg.Name, Site: g.cfg.Site})
		return
	}
	g.cfg.Handler.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), fromKey{}, p)))
}

const alivePath = "/peer/v1/alive"

type alive struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Site string `json:"site,omitempty"`
}

// Ping asks a peer whether it is there and returns how long the answer took.
func (g *Group) Ping(ctx context.Context, p Peer) (time.Duration, error) {
	l, err := g.Link(ctx, p)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	var a alive
	if err := l.Call(ctx, http.MethodGet, alivePath, nil, &a); err != nil {
		return 0, err
	}
	g.moved(p.ID, a.Site)
	return time.Since(began), nil
}

// Close ends all connections.
func (g *Group) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, all := range []map[string]*Link{g.links, g.streams, g.turned} {
		for _, l := range all {
			l.close()
		}
	}
	return nil
}
