package lasting

import (
	"bytes"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	// maxStreams bounds the connections into one sandbox.
	maxStreams = 1024
	// detached is how long the guest keeps a connection that has lost its carrier.
	detached = 15 * time.Minute
	// greetTime bounds a greeting and its answer.
	greetTime = 15 * time.Second
)

// Guest is the guest's end: the connections that there are.
type Guest struct {
	// Allows reports whether a token is the sandbox's.
	Allows func(token string) bool
	// Serve returns what serves a connection to a port, and closes it, or why nothing does.
	Serve func(port int) (func(net.Conn), error)

	mu      sync.Mutex
	streams map[id]*Conn
	waiting map[*Conn]*time.Timer // those that have lost their carrier
}

// Listen returns a listener of l's connections that are not carriers of lasting ones.
func (g *Guest) Listen(l net.Listener) net.Listener { return listener{l, g} }

type listener struct {
	net.Listener
	g *Guest
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &stranger{Conn: c, g: l.g}, nil
}

// stranger is a connection of which it is not known yet what it is: nothing else begins with a zero.
type stranger struct {
	net.Conn
	g     *Guest
	known bool // only its one reader looks at it, before others know the connection

	mu    sync.Mutex
	taken bool // it is a carrier, and no longer its acceptor's
}

// Read implements net.Conn. A carrier is at its end for whoever accepted it.
func (s *stranger) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.known || n == 0 {
		return n, err
	}
	s.known = true
	if p[0] != magic[0] {
		return n, err
	}
	begin := append([]byte(nil), p[:n]...)
	s.mu.Lock()
	s.taken = true
	_ = s.Conn.SetDeadline(time.Now().Add(greetTime))
	s.mu.Unlock()
	go s.g.greet(s.Conn, begin)
	return 0, io.EOF
}

// mine passes on what its acceptor does to a connection that is no carrier.
func (s *stranger) mine(do func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken {
		return nil
	}
	return do()
}

func (s *stranger) Close() error { return s.mine(s.Conn.Close) }
func (s *stranger) SetDeadline(t time.Time) error {
	return s.mine(func() error { return s.Conn.SetDeadline(t) })
}
func (s *stranger) SetReadDeadline(t time.Time) error {
	return s.mine(func() error { return s.Conn.SetReadDeadline(t) })
}
func (s *stranger) SetWriteDeadline(t time.Time) error {
	return s.mine(func() error { return s.Conn.SetWriteDeadline(t) })
}

// CloseWrite ends one direction, where the connection can.
func (s *stranger) CloseWrite() error {
	if half, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return s.Close()
}

// ReadFrom lets files be sent without a copy.
func (s *stranger) ReadFrom(r io.Reader) (int64, error) {
	if to, ok := s.Conn.(io.ReaderFrom); ok {
		return to.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{s.Conn}, r)
}

// greet answers a greeting, of which begin has been read.
func (g *Guest) greet(carrier net.Conn, begin []byte) {
	in := newReader(io.MultiReader(bytes.NewReader(begin), carrier))
	hello, err := readGreeting(in)
	if err != nil {
		_ = carrier.Close()
		return
	}
	c, say, begun := g.stream(hello)
	if say.verdict != saidYes {
		_, _ = carrier.Write(say.encode())
		_ = carrier.Close()
		return
	}
	_, err = carrier.Write(say.encode())
	_ = carrier.SetDeadline(time.Time{})
	if err == nil {
		err = c.attach(carrier, in, hello.received)
	}
	if err != nil {
		_ = carrier.Close()
	}
	switch {
	case begun == nil && err != nil:
		g.lost(c)
	case begun != nil && err != nil: // the client does not know of it
		c.fail(errEnded)
		begun(c)
	case begun != nil:
		begun(c)
	}
}

// stream finds or makes the connection that a greeting asks for. begun, when it is not nil, serves it.
func (g *Guest) stream(hello greeting) (c *Conn, say answer, begun func(net.Conn)) {
	if !g.Allows(hello.token) {
		return nil, answer{verdict: saidDenied}, nil
	}
	if hello.what == askResume {
		g.mu.Lock()
		c := g.streams[hello.stream]
		if c != nil {
			g.stop(c)
		}
		g.mu.Unlock()
		if c == nil {
			return nil, answer{verdict: saidUnknown}, nil
		}
		c.detach()
		received, kept := c.state(hello.received)
		if !kept {
			g.lost(c)
			return nil, answer{verdict: saidUnknown}, nil
		}
		return c, answer{verdict: saidYes, received: received}, nil
	}
	serve, err := g.Serve(int(hello.port))
	if err != nil {
		return nil, answer{verdict: saidRefused, reason: err.Error()}, nil
	}
	c = newConn(hello.stream, int(hello.port))
	c.lost, c.forget = g.lost, g.forget
	g.mu.Lock()
	room := len(g.streams) < maxStreams && g.streams[hello.stream] == nil
	if room {
		if g.streams == nil {
			g.streams, g.waiting = make(map[id]*Conn), make(map[*Conn]*time.Timer)
		}
		g.streams[hello.stream] = c
	}
	g.mu.Unlock()
	if !room {
		c.fail(errEnded)
		go serve(c) // closes what it has opened
		return nil, answer{verdict: saidFull}, nil
	}
	return c, answer{verdict: saidYes}, serve
}

// lost waits for another carrier, for a while.
func (g *Guest) lost(c *Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.streams[c.id] != c {
		return
	}
	g.stop(c)
	g.waiting[c] = time.AfterFunc(detached, func() { c.fail(errEnded) })
}

// stop ends the wait for a carrier. mu is held.
func (g *Guest) stop(c *Conn) {
	if t := g.waiting[c]; t != nil {
		t.Stop()
		delete(g.waiting, c)
	}
}

func (g *Guest) forget(c *Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stop(c)
	if g.streams[c.id] == c {
		delete(g.streams, c.id)
	}
}

// Drop ends all connections: their clients belong to another life of the sandbox.
func (g *Guest) Drop() {
	g.mu.Lock()
	all := slices.Collect(maps.Values(g.streams))
	g.mu.Unlock()
	for _, c := range all {
		c.fail(errEnded)
	}
}
