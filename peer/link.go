package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// The protocols that TLS negotiates: who dials asks, or who dials is asked.
const (
	protocol        = "atoll/1"
	protocolTurned  = "atoll/1-turned"
	protocolStreams = "atoll/1-streams" // as the first, for many streams of which any may stand still
)

const (
	dialTimeout   = 15 * time.Second
	aliveInterval = 15 * time.Second // a quiet connection is tried this often, and given up when that is not answered
	aliveTimeout  = 15 * time.Second
)

// Tuning is how connections are made for long, fat, lossy paths.
type Tuning struct {
	Congestion string // congestion control to ask the kernel for; empty: its default
	Flows      int    // connections side by side
}

// Tune decides by the kernel's list of congestion controls: BBR keeps its rate when packets are lost at random, and a few
// flows of it get past the limit of the kernel's buffers. Others halve theirs at each loss, so that more flows lose less. It
// is a pure function.
func Tune(available string) Tuning {
	for _, name := range strings.Fields(available) {
		if name == "bbr" {
			return Tuning{Congestion: "bbr", Flows: 3}
		}
	}
	return Tuning{Flows: 8}
}

// tuning is that of this host.
var tuning = sync.OnceValue(func() Tuning {
	list, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		return Tune("")
	}
	return Tune(string(list))
})

// tune sets up a connection. What the kernel refuses stays as it was.
func tune(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) {
		if cc := tuning().Congestion; cc != "" {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, cc)
		}
		// What waits in the kernel cannot be overtaken by anything more urgent.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 256<<10)
	})
}

// dial connects to a node that must have the authority with the pin.
func (g *Group) dial(ctx context.Context, addr, proto string, pin [32]byte) (*tls.Conn, error) {
	const op = "peer.Dial"
	d := net.Dialer{Timeout: dialTimeout, Control: func(_, _ string, raw syscall.RawConn) error {
		tune(raw)
		return nil
	}}
	raw, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, sandbox.E(op, kindOf(err), addr, err).WithHint("is `atoll up` running there, and does it listen on an address that is reached from here?")
	}
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{proto}, Certificates: []tls.Certificate{g.cfg.Cert},
		InsecureSkipVerify: true, // names mean nothing here: VerifyConnection compares authorities
		VerifyConnection: func(s tls.ConnectionState) error {
			authority, _, _, err := g.recognise(s.PeerCertificates)
			if err == nil && pinOf(authority) != pin {
				err = errors.New("it is another node")
			}
			return err
		},
	})
	ctx, stop := context.WithTimeout(ctx, dialTimeout)
	defer stop()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(sandbox.E(op, kindOf(err), addr, err), raw.Close())
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != proto {
		return nil, errors.Join(sandbox.Errorf(op, sandbox.Unsupported, addr, "it does not speak %s", proto), conn.Close())
	}
	return conn, nil
}

// kindOf tells who is at fault: nobody answers, the wrong one answers, or the caller gave up.
func kindOf(err error) sandbox.Kind {
	var cert *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.Is(err, context.Canceled):
		return sandbox.Canceled
	case errors.As(err, &cert), errors.As(err, &unknown), strings.Contains(err.Error(), "another node"):
		return sandbox.Denied
	}
	return sandbox.Unavailable
}

// Link asks one peer, over all flows to it. It is safe for use by several goroutines.
type Link struct {
	Peer Peer
	t    *http2.Transport //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2

	mu    sync.Mutex
	flows []*http2.ClientConn //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	conns []net.Conn
	next  int
}

func (g *Group) newLink(p Peer, conns ...*tls.Conn) *Link {
	l := &Link{Peer: p, t: &http2.Transport{ReadIdleTimeout: aliveInterval, PingTimeout: aliveTimeout, DisableCompression: true}} //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	for _, c := range conns {
		_ = l.add(c) // a connection that is dead already is found out by the first request
	}
	return l
}

func (l *Link) add(c net.Conn) error {
	flow, err := l.t.NewClientConn(c) //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	if err != nil {
		return errors.Join(err, c.Close())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flows, l.conns = append(l.flows, flow), append(l.conns, c)
	return nil
}

// flow returns the next flow that takes a request; nil if there is none.
func (l *Link) flow() *http2.ClientConn { //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	l.mu.Lock()
	defer l.mu.Unlock()
	for range l.flows {
		l.next = (l.next + 1) % len(l.flows)
		if f := l.flows[l.next]; usable(f) {
			return f
		}
	}
	return nil
}

// usable reports whether a flow takes a request. One that was closed before its first says that it does, so as to report why.
func usable(f *http2.ClientConn) bool { //nolint:staticcheck // net/http takes no connection whose protocol has another name than h2
	st := f.State()
	return !st.Closed && !st.Closing && f.CanTakeNewRequest()
}

// Flows returns how many connections the link has that take requests.
func (l *Link) Flows() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.flows {
		if usable(f) {
			n++
		}
	}
	return n
}

// Steady reports whether a single connection keeps its speed when packets are lost at random.
func (l *Link) Steady() bool { return tuning().Congestion != "" }

func (l *Link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		_ = c.Close()
	}
}

// Do makes a request; path begins with a slash. An answer that is an error becomes one. The caller closes the body.
func (l *Link) Do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	return l.Request(ctx, method, path, body, nil)
}

// Request is Do with a header.
func (l *Link) Request(ctx context.Context, method, path string, body io.Reader, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+protocolHost+path, body)
	if err != nil {
		return nil, sandbox.E("peer.Do", sandbox.Invalid, path, err)
	}
	if header != nil {
		req.Header = header
	}
	resp, err := l.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, failure(resp)
	}
	return resp, nil
}

// RoundTrip makes a request whose answer is whatever the peer says. Its error is Unavailable when the connection is lost. It
// makes a Link an http.RoundTripper.
func (l *Link) RoundTrip(r *http.Request) (*http.Response, error) {
	const op = "peer.Do"
	flow := l.flow()
	if flow == nil {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, l.Peer.Name, "the connection is lost")
	}
	if r.URL.Host != protocolHost {
		r = r.Clone(r.Context())
		r.URL.Scheme, r.URL.Host, r.Host = "https", protocolHost, protocolHost
	}
	resp, err := flow.RoundTrip(r)
	if err != nil {
		kind := sandbox.Unavailable
		if r.Context().Err() != nil {
			kind = sandbox.KindOf(r.Context().Err())
		}
		return nil, sandbox.E(op, kind, l.Peer.Name, err)
	}
	return resp, nil
}

// protocolHost stands where HTTP wants a host.
const protocolHost = "peer.atoll"

// Call makes a request with a JSON body, unless in is nil, whose answer is JSON, unless out is nil.
func (l *Link) Call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return sandbox.E("peer.Call", sandbox.Invalid, path, err)
		}
		body = bytes.NewReader(data)
	}
	resp, err := l.Do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return sandbox.E("peer.Call", sandbox.Unavailable, l.Peer.Name, err)
	}
	return nil
}

// maxAnswer bounds a JSON answer, in bytes.
const maxAnswer = 16 << 20

// problem is an error on its way between nodes.
type problem struct {
	Kind    sandbox.Kind `json:"kind"`
	Subject string       `json:"subject,omitempty"`
	Detail  string       `json:"detail"`
	Hint    string       `json:"hint,omitempty"`
}

// Fail answers with an error.
func Fail(w http.ResponseWriter, err error) {
	p := problem{Kind: sandbox.KindOf(err), Detail: err.Error()}
	var known *sandbox.Err
	if errors.As(err, &known) {
		p.Subject, p.Hint = known.Subject, sandbox.HintOf(err)
		p.Detail = string(known.Kind)
		if known.Err != nil {
			p.Detail = known.Err.Error()
		}
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	_ = json.NewEncoder(w).Encode(p) // the peer may have gone
}

// failure is the error of an answer that is none.
func failure(resp *http.Response) error {
	var p problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxJoin)).Decode(&p); err != nil || p.Kind == "" {
		return sandbox.Errorf("peer.Do", sandbox.Unavailable, "", "the node answers %s", resp.Status)
	}
	return &sandbox.Err{Op: "peer", Kind: p.Kind, Subject: p.Subject, Err: errors.New(p.Detail), Hint: p.Hint}
}

// Answer answers with JSON.
func Answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the peer may have gone
}

// Link returns the link to a peer: an open one, one that the peer turned round, or a new one.
func (g *Group) Link(ctx context.Context, p Peer) (*Link, error) {
	return g.link(ctx, p, protocol, g.links)
}

// Streams returns a link for requests that last, and whose bytes may stand still: they hold up no others than such.
func (g *Group) Streams(ctx context.Context, p Peer) (*Link, error) {
	return g.link(ctx, p, protocolStreams, g.streams)
}

// link returns the link among open ones, one that the peer turned round, or a new one.
func (g *Group) link(ctx context.Context, p Peer, proto string, links map[string]*Link) (*Link, error) {
	g.mu.Lock()
	open, turned := links[p.ID], g.turned[p.ID]
	g.mu.Unlock()
	for _, l := range []*Link{open, turned} {
		if l != nil && l.Flows() > 0 {
			return l, nil
		}
	}
	conns, err := g.dialFlows(ctx, p, proto)
	if err != nil {
		return nil, err
	}
	l := g.newLink(p, conns...)
	g.mu.Lock()
	defer g.mu.Unlock()
	if old := links[p.ID]; old != nil {
		if old.Flows() > 0 { // another dialled at the same time
			l.close()
			return old, nil
		}
		old.close()
	}
	links[p.ID] = l
	return l, nil
}

// dialFlows opens all flows to a peer at once. One that works is enough.
func (g *Group) dialFlows(ctx context.Context, p Peer, proto string) ([]*tls.Conn, error) {
	if p.Addr == "" {
		return nil, sandbox.Errorf("peer.Dial", sandbox.Unavailable, p.Name, "it is not known where the node is reached").
			WithHint("let that node pull, or join again from here")
	}
	ca, err := x509.ParseCertificate(p.CA)
	if err != nil {
		return nil, sandbox.E("peer.Dial", sandbox.Internal, p.Name, err)
	}
	pin := pinOf(ca)
	conns := make([]*tls.Conn, tuning().Flows)
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() { conns[i], errs[i] = g.dial(ctx, p.Addr, proto, pin) })
	}
	wg.Wait()
	var good []*tls.Conn
	for i, c := range conns {
		if errs[i] == nil {
			good = append(good, c)
		}
	}
	if len(good) == 0 {
		return nil, sandbox.E("peer.Dial", "", p.Name, errs[0])
	}
	return good, nil
}

// Turn lets a peer ask this node over connections that this node dials, until the returned function is called.
func (g *Group) Turn(ctx context.Context, p Peer) (end func(), err error) {
	conns, err := g.dialFlows(ctx, p, protocolTurned)
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() { g.serve(c) })
	}
	return func() {
		for _, c := range conns {
			_ = c.Close()
		}
		wg.Wait()
	}, nil
}

// String names the peer for people.
func (p Peer) String() string { return fmt.Sprintf("%s (%s)", p.Name, p.ID) }

// Turned returns the link over connections that a peer has turned round, and waits a little for the first of them.
func (g *Group) Turned(ctx context.Context, p Peer) (*Link, error) {
	ctx, stop := context.WithTimeout(ctx, dialTimeout)
	defer stop()
	for {
		g.mu.Lock()
		l := g.turned[p.ID]
		g.mu.Unlock()
		if l != nil && l.Flows() > 0 {
			return l, nil
		}
		select {
		case <-ctx.Done():
			return nil, sandbox.Errorf("peer.Turned", sandbox.Unavailable, p.Name, "the node has not turned a connection round")
		case <-time.After(10 * time.Millisecond): // the handshake ends here a moment after it ended there
		}
	}
}
