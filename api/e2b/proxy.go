package e2b

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// headerTraffic carries the token for ports of a sandbox whose traffic is not
// public.
const headerTraffic = "E2b-Traffic-Access-Token"

// dialTime bounds reaching a port, a resume included.
const dialTime = 60 * time.Second

// proxy carries data-plane requests to ports inside sandboxes. Nothing is
// buffered: bytes go on as they come, both ways, until either side ends.
type proxy struct {
	node    *node.Node
	reverse *httputil.ReverseProxy
}

// newProxy makes a proxy that reaches ports by node.Dial.
func newProxy(n *node.Node, l *slog.Logger) *proxy {
	p := &proxy{node: n}
	p.reverse = &httputil.ReverseProxy{
		Rewrite:       rewrite,
		Transport:     newTransports(n),
		FlushInterval: -1, // at once: streams of events are often tiny
		ErrorHandler:  p.failed,
		ErrorLog:      log.New(logWriter{l}, "", 0),
		BufferPool:    newBuffers(),
	}
	return p
}

// target is what a request's context says of where it goes.
type target struct {
	address
	labels map[string]string
}

type targetKey struct{}

func targetOf(ctx context.Context) target {
	t, _ := ctx.Value(targetKey{}).(target)
	return t
}

// serve carries one request, unless the sandbox is not there or the client has
// no right to the port.
func (p *proxy) serve(w http.ResponseWriter, r *http.Request, to address) {
	settled, stop := context.WithTimeout(r.Context(), dialTime)
	sb, err := p.node.Settled(settled, to.id) // one that is between two nodes is soon in one
	stop()
	if err != nil || sb.ID != to.id || sb.Pooled != "" || sb.Internal || !reachable(sb) {
		refuse(w, r, refusal{Message: "The sandbox was not found", SandboxID: to.id, Code: http.StatusBadGateway}, "Sandbox Not Found")
		return
	}
	if to.port == sandbox.GuestPort && r.URL.Path == "/init" {
		// Only the node tells a guest who it is.
		refuse(w, r, refusal{Message: "Not Found", SandboxID: to.id, Code: http.StatusNotFound}, "Not Found")
		return
	}
	if bad := checkTraffic(sb, to.port, r.Header.Get(headerTraffic)); bad != nil {
		refuse(w, r, bad.refusal, bad.title)
		return
	}
	ctx := context.WithValue(r.Context(), targetKey{}, target{address: to, labels: sb.Spec.Labels})
	if sb.Moved != "" { // it may be paused there
		if why := mayWake(sb, to.port, r); why != "" {
			writeJSON(w, http.StatusUnauthorized, apiError{Code: http.StatusUnauthorized, Message: why})
			return
		}
	}
	if sb.State == sandbox.Paused {
		if why := mayWake(sb, to.port, r); why != "" {
			writeJSON(w, http.StatusUnauthorized, apiError{Code: http.StatusUnauthorized, Message: why})
			return
		}
		if _, _, err := p.node.Connect(r.Context(), sb.ID, wokenLife(sb)); err != nil {
			p.failed(w, r.WithContext(ctx), &dialError{err})
			return
		}
	}
	// A server inside may answer before it has read the whole request. Without
	// this, ours would then take the rest of the body away from the transport,
	// which breaks off the exchange. HTTP/2 works like this anyway.
	_ = http.NewResponseController(w).EnableFullDuplex()
	p.reverse.ServeHTTP(w, r.WithContext(ctx))
}

// mayWake reports why a request does not wake a paused sandbox, or "" when it
// does: what the guest would refuse must cost nothing.
func mayWake(sb node.Sandbox, port int, r *http.Request) string {
	if port != sandbox.GuestPort || sb.GuestToken == "" || r.URL.Path == "/health" {
		return ""
	}
	if subtle.ConstantTimeCompare([]byte(r.Header.Get(wire.HeaderToken)), []byte(sb.GuestToken)) == 1 {
		return ""
	}
	if r.URL.Path == "/files" {
		return checkSignature(sb, r, time.Now().Unix())
	}
	return "unauthorized access, please provide a valid access token"
}

// reachable reports whether traffic finds the sandbox running, here or elsewhere, or wakes it.
func reachable(sb node.Sandbox) bool {
	return sb.State == sandbox.Running || sb.State == sandbox.Paused && sb.Lifecycle.AutoResume || sb.Moved != ""
}

// minWokenLife is how long a sandbox lives at least once traffic has woken it:
// one made for seconds would else be asleep again before it could answer.
const minWokenLife = 5 * time.Minute

// wokenLife is the life that traffic gives to a paused sandbox; zero for one
// that has no end.
func wokenLife(sb node.Sandbox) time.Duration {
	if sb.Lifecycle.Timeout == 0 {
		return 0
	}
	return max(sb.Lifecycle.Timeout, minWokenLife)
}

// denial is a refusal and the title of its page.
type denial struct {
	refusal
	title string
}

// checkTraffic reports why a client with this traffic token may not reach the
// port; nil if it may. The guest agent checks a token of its own.
func checkTraffic(sb node.Sandbox, port int, token string) *denial {
	if port == sandbox.GuestPort || sb.PublicTraffic {
		return nil
	}
	d := &denial{refusal: refusal{SandboxID: sb.ID, Code: http.StatusForbidden}}
	switch {
	case token == "":
		d.title = "Missing Traffic Access Token"
		d.Message = "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing"
	case sb.TrafficToken == "" || subtle.ConstantTimeCompare([]byte(token), []byte(sb.TrafficToken)) != 1:
		d.title = "Invalid Traffic Access Token"
		d.Message = "Sandbox is secured with traffic access token. Provided token in header 'e2b-traffic-access-token' is invalid"
	default:
		return nil
	}
	return d
}

// rewrite turns the client's request into the one that the server inside sees:
// the same, without what was meant for us.
func rewrite(pr *httputil.ProxyRequest) {
	to := targetOf(pr.In.Context())
	pr.Out.URL.Scheme = "http"
	if slices.Contains(httpsPorts(to.labels), to.port) {
		pr.Out.URL.Scheme = "https"
	}
	// The transport dials by this; servers see the Host header.
	pr.Out.URL.Host = net.JoinHostPort(to.id, strconv.Itoa(to.port))
	// What the server inside makes of a strange query is its own affair: nothing
	// here decides by it.
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery
	pr.Out.Host = pr.In.Host
	if h := maskedHost(to.labels, to.port); h != "" {
		pr.Out.Host = h
	}
	pr.Out.Header["X-Forwarded-For"] = pr.In.Header["X-Forwarded-For"]
	pr.SetXForwarded()
	for _, h := range []string{headerSandbox, headerPort, headerTraffic} {
		pr.Out.Header.Del(h)
	}
	// Without this the transport would ask for gzip by itself and unpack it,
	// and the client would get other bytes than the server sent.
	if pr.In.Header.Get("Accept-Encoding") == "" {
		pr.Out.Header.Set("Accept-Encoding", "identity")
	}
}

// failed answers when the port could not be reached or the server inside broke
// off before it answered.
func (p *proxy) failed(w http.ResponseWriter, r *http.Request, err error) {
	to := targetOf(r.Context())
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // nobody is left to answer
	}
	gone := refusal{Message: "The sandbox was not found", SandboxID: to.id, Code: http.StatusBadGateway}
	var dial *dialError
	if !errors.As(err, &dial) {
		// It was reached and broke off. Was it the server, or the whole sandbox?
		if sb, e := p.node.Get(r.Context(), to.id); e != nil || sb.State != sandbox.Running {
			refuse(w, r, gone, "Sandbox Not Found")
			return
		}
		refuse(w, r, refusal{Message: "The connection to the port broke off", SandboxID: to.id, Port: to.port, Code: http.StatusBadGateway}, "Connection Error")
		return
	}
	switch sandbox.KindOf(dial.err) {
	case sandbox.NotFound, sandbox.Conflict:
		refuse(w, r, gone, "Sandbox Not Found")
	case sandbox.Unavailable:
		refuse(w, r, refusal{Message: "The sandbox is running but port is not open", SandboxID: to.id, Port: to.port, Code: http.StatusBadGateway}, "Closed Port Error")
	default:
		refuse(w, r, refusal{Message: "The sandbox could not be reached: " + messageOf(dial.err), SandboxID: to.id, Port: to.port, Code: http.StatusBadGateway}, "Sandbox Error")
	}
}

// transports is the way into sandboxes: HTTP/2 without TLS for gRPC, HTTP/1.1
// for all else.
type transports struct {
	plain, grpc *http.Transport
}

// newTransports makes transports that open a connection for each request. A
// kept one could belong to a sandbox that was paused meanwhile, would not wake
// it, and would not be counted as traffic.
func newTransports(n *node.Node) *transports {
	dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
		id, p, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		port, err := strconv.Atoi(p)
		if err != nil {
			return nil, err
		}
		ctx, stop := context.WithTimeout(ctx, dialTime)
		defer stop()
		c, err := n.Dial(ctx, id, port)
		if err != nil {
			return nil, &dialError{err}
		}
		return c, nil
	}
	plain := &http.Transport{
		DialContext:        dial,
		DisableKeepAlives:  true,
		DisableCompression: true,
		// The servers inside have whatever certificate they made for themselves,
		// and the way to them is inside this host.
		TLSClientConfig:     &tls.Config{InsecureSkipVerify: true},
		TLSHandshakeTimeout: dialTime,
		// None while a client may wait for as long as it likes: ResponseHeaderTimeout.
	}
	grpc := plain.Clone()
	grpc.Protocols = new(http.Protocols)
	grpc.Protocols.SetUnencryptedHTTP2(true)
	return &transports{plain: plain, grpc: grpc}
}

// RoundTrip sends r by the transport for its kind.
func (t *transports) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme == "http" && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		return t.grpc.RoundTrip(r)
	}
	return t.plain.RoundTrip(r)
}

// dialError tells a port that could not be reached from a server that failed.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// buffers lends copy buffers to the reverse proxy.
type buffers struct{ free chan []byte }

const (
	bufferSize  = 32 << 10 // bytes
	buffersKept = 256
)

func newBuffers() *buffers { return &buffers{free: make(chan []byte, buffersKept)} }

// Get returns a buffer.
func (b *buffers) Get() []byte {
	select {
	case buf := <-b.free:
		return buf
	default:
		return make([]byte, bufferSize)
	}
}

// Put takes a buffer back.
func (b *buffers) Put(buf []byte) {
	select {
	case b.free <- buf:
	default:
	}
}

// logWriter passes the reverse proxy's own complaints, such as a client that
// went away in the middle of a body, to the log.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Debug("sandbox traffic", "error", strings.TrimSpace(string(b)))
	return len(b), nil
}
