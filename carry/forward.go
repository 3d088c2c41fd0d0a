package carry

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// Whoever comes to a node for a sandbox that has moved on is led to where it is: requests of the APIs are passed on in the name
// of the key that this node has verified, and connections into the sandbox by streams of bytes. A sandbox that moved on and on
// is followed from node to node.
const (
	forwardPath = "/carry/v1/api/"
	headerHops  = "Atoll-Hops"
	maxHops     = 8
)

type hopsKey struct{}

// withHops notes how many nodes have passed a request on.
func withHops(r *http.Request) (*http.Request, error) {
	n, err := strconv.Atoi("0" + r.Header.Get(headerHops))
	if err != nil || n >= maxHops {
		return r, sandbox.Errorf("carry.Forward", sandbox.Unavailable, "", "%d nodes have passed this on, and none has the sandbox", maxHops)
	}
	return r.WithContext(context.WithValue(r.Context(), hopsKey{}, n)), nil
}

func nextHop(ctx context.Context) string {
	n, _ := ctx.Value(hopsKey{}).(int)
	return strconv.Itoa(n + 1)
}

// UseAPI sets what answers requests that other nodes pass on, before any comes.
func (c *Carrier) UseAPI(h http.Handler) { c.api = h }

// Forward has another node answer a request of an API. r says in its header in whose name; see UseAPI.
func (c *Carrier) Forward(w http.ResponseWriter, r *http.Request, to string) error {
	const op = "carry.Forward"
	p, err := c.group.Find(to)
	if err != nil {
		return sandbox.E(op, sandbox.Unavailable, to, err)
	}
	l, err := c.group.Streams(r.Context(), p)
	if err != nil {
		return err
	}
	var failed error
	proxy := httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Path = strings.TrimSuffix(forwardPath, "/") + pr.In.URL.Path
			pr.Out.URL.RawPath = ""
			pr.Out.Header.Set(headerHops, nextHop(r.Context()))
		},
		Transport: l, FlushInterval: -1,
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { failed = err },
	}
	proxy.ServeHTTP(w, r)
	return failed
}

// serveForwarded answers a request that another node passes on.
func (c *Carrier) serveForwarded(w http.ResponseWriter, r *http.Request) {
	r, err := withHops(r)
	if err == nil && c.api == nil {
		err = sandbox.Errorf("carry.Forward", sandbox.Unsupported, "", "this node has no API")
	}
	if err != nil {
		peer.Fail(w, err)
		return
	}
	http.StripPrefix(strings.TrimSuffix(forwardPath, "/"), c.api).ServeHTTP(w, r)
}

// reach opens a connection to a port of a sandbox that has moved to another node.
func (c *Carrier) reach(ctx context.Context, to, id string, port int, wake bool) (net.Conn, error) {
	const op = "carry.Stream"
	p, err := c.group.Find(to)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unavailable, id, err)
	}
	l, err := c.group.Streams(ctx, p)
	if err != nil {
		return nil, err
	}
	// What was opened outlives the call; until then the caller may give up.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	from, body := io.Pipe()
	resp, err := l.Request(life, http.MethodPost, fmt.Sprintf("/carry/v1/reach/%s/%d?wake=%t", id, port, wake), from, http.Header{headerHops: {nextHop(ctx)}})
	if !stop() && err == nil {
		_ = resp.Body.Close()
		err = sandbox.E(op, "", id, ctx.Err())
	}
	if err != nil {
		end()
		_ = body.Close()
		return nil, err
	}
	return &line{in: resp.Body, out: body, end: end}, nil
}

// serveReach joins a peer's stream with a connection into a sandbox.
func (c *Carrier) serveReach(w http.ResponseWriter, r *http.Request) {
	r, err := withHops(r)
	port, badPort := strconv.Atoi(r.PathValue("port"))
	if err == nil && (badPort != nil || !sandbox.ValidID(r.PathValue("sandbox"))) {
		err = sandbox.Errorf("carry.Stream", sandbox.Invalid, r.PathValue("sandbox"), "not a sandbox's port")
	}
	var inside net.Conn
	if err == nil {
		inside, err = c.cfg.Node.Reach(r.Context(), r.PathValue("sandbox"), port, r.URL.Query().Get("wake") == "true")
	}
	if err != nil {
		peer.Fail(w, err)
		return
	}
	defer inside.Close()
	rc := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if rc.Flush() != nil {
		return
	}
	go func() {
		if _, err := io.Copy(inside, r.Body); err != nil {
			_ = inside.Close()
		} else if half, ok := inside.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := inside.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil || rc.Flush() != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// line is a connection over a peer's link. It knows no deadlines: what lasts longer than it (package lasting) does.
type line struct {
	in  io.ReadCloser
	out *io.PipeWriter
	end context.CancelFunc
}

func (s *line) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s *line) Write(p []byte) (int, error) { return s.out.Write(p) }

// CloseWrite says that nothing more will be written.
func (s *line) CloseWrite() error { return s.out.Close() }

// Close ends both directions.
func (s *line) Close() error {
	s.end()
	_ = s.out.Close()
	return s.in.Close()
}

func (s *line) LocalAddr() net.Addr              { return &net.UnixAddr{Net: "peer"} }
func (s *line) RemoteAddr() net.Addr             { return &net.UnixAddr{Net: "peer"} }
func (s *line) SetDeadline(time.Time) error      { return nil }
func (s *line) SetReadDeadline(time.Time) error  { return nil }
func (s *line) SetWriteDeadline(time.Time) error { return nil }
