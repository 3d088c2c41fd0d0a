// Package guest reaches into a sandbox: its Client speaks to the agent that runs
// inside of every one (cmd/atoll-guest, served by package guest/server).
//
// The protocol is E2B's envd protocol, with Atoll's additions; package
// guest/server documents it. A Client needs nothing but a way to open
// connections, such as sandbox.Runtime.Dial.
package guest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atoll-run/atoll/guest/gen/filesystem/filesystemconnect"
	"github.com/atoll-run/atoll/guest/gen/process/processconnect"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Dial opens a connection to the agent.
type Dial func(ctx context.Context) (net.Conn, error)

// Options are how calls present themselves. The zero value is good before /init.
type Options struct {
	Token  string      // access token of the sandbox
	User   string      // whom processes run as and who owns files; empty: the sandbox's default user
	Header http.Header // added to every call; may be nil
	// JSON has calls written as E2B's SDKs write them, instead of in fewer bytes.
	JSON bool
}

// Client calls one agent. It may be used from many goroutines. Every error is
// a *sandbox.Err.
type Client struct {
	dial      Dial // nil when made by NewURL
	transport *http.Transport
	http      *http.Client
	base      string // without a slash at the end
	opts      Options
	process   processconnect.ProcessClient
	files     filesystemconnect.FilesystemClient
}

const (
	// idleConns is how many connections are kept for reuse, for idleTime.
	idleConns = 8
	idleTime  = 30 * time.Second
)

// New makes a client that opens its connections by dial.
func New(dial Dial, opts Options) *Client {
	t := newTransport()
	t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }
	c := newClient(t, "http://guest", opts)
	c.dial = dial
	return c
}

// NewURL makes a client that goes through a daemon's proxy, which finds the
// sandbox by the host name in base or by opts.Header.
func NewURL(base string, opts Options) *Client {
	t := newTransport()
	t.Proxy = http.ProxyFromEnvironment
	return newClient(t, strings.TrimRight(base, "/"), opts)
}

func newTransport() *http.Transport {
	return &http.Transport{
		MaxIdleConns:        idleConns,
		MaxIdleConnsPerHost: idleConns,
		IdleConnTimeout:     idleTime,
		DisableCompression:  true, // the content of files is what it is
	}
}

func newClient(t *http.Transport, base string, opts Options) *Client {
	c := &Client{transport: t, base: base, opts: opts}
	c.http = &http.Client{Transport: c}
	rpc := []connect.ClientOption{connect.WithAcceptCompression("gzip", nil, nil)}
	if opts.JSON {
		rpc = append(rpc, connect.WithProtoJSON())
	}
	c.process = processconnect.NewProcessClient(c.http, base, rpc...)
	c.files = filesystemconnect.NewFilesystemClient(c.http, base, rpc...)
	return c
}

// With returns a client that shares connections with c but presents itself
// otherwise.
func (c *Client) With(opts Options) *Client {
	n := newClient(c.transport, c.base, opts)
	n.dial = c.dial
	return n
}

// CloseIdle closes the connections that are kept for reuse, as is wise after a
// restore, which cuts them.
func (c *Client) CloseIdle() { c.transport.CloseIdleConnections() }

// RoundTrip adds the headers that every call has. It makes Client an
// http.RoundTripper, so that a proxy can forward requests as they are.
func (c *Client) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	c.present(r)
	if retryable[r.URL.Path] {
		// A kept connection may turn out to be dead, say after a restore. Such a
		// header, never sent when empty, lets http.Transport try again on a new one.
		r.Header["X-Idempotency-Key"] = []string{}
	}
	return c.transport.RoundTrip(r)
}

// present adds the headers of c's options.
func (c *Client) present(r *http.Request) {
	for name, values := range c.opts.Header {
		r.Header[name] = values
	}
	if c.opts.Token != "" {
		r.Header.Set(wire.HeaderToken, c.opts.Token)
	}
	if c.opts.User != "" && r.Header.Get("Authorization") == "" {
		user, group, _ := strings.Cut(c.opts.User, ":")
		r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":"+group)))
	}
}

// retryable are the paths of POST calls that may be made twice. The transport
// knows by itself that GET calls may.
var retryable = map[string]bool{
	"/init":                                   true,
	processconnect.ProcessListProcedure:       true,
	processconnect.ProcessConnectProcedure:    true,
	processconnect.ProcessUpdateProcedure:     true,
	filesystemconnect.FilesystemStatProcedure: true, filesystemconnect.FilesystemListDirProcedure: true,
	filesystemconnect.FilesystemRemoveProcedure: true, filesystemconnect.FilesystemWatchDirProcedure: true,
}

// call makes a plain HTTP call and returns the answer, whose body the caller
// closes. Any status outside 2xx is an error.
func (c *Client) call(ctx context.Context, op, method, path string, query url.Values, body io.Reader, header http.Header) (*http.Response, error) {
	target := c.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	for name, values := range header {
		req.Header[name] = values
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, transportError(op, err)
	}
	if res.StatusCode/100 != 2 {
		defer res.Body.Close()
		return nil, statusError(op, res)
	}
	return res, nil
}

// Health asks whether the agent answers.
func (c *Client) Health(ctx context.Context) error {
	return c.simple(ctx, "guest.Health", http.MethodGet, "/health", nil, nil)
}

// WaitHealthy asks until the agent answers or ctx ends. An error that will not
// go away by waiting is returned at once.
func (c *Client) WaitHealthy(ctx context.Context) error {
	const pause, longest = time.Millisecond, 50 * time.Millisecond
	for wait := pause; ; wait = min(2*wait, longest) {
		err := c.Health(ctx)
		if err == nil || !sandbox.Is(err, sandbox.Unavailable) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return sandbox.E("guest.WaitHealthy", sandbox.KindOf(ctx.Err()), "", err)
		}
	}
}

// Init tells a new or restored sandbox who it is. When the sandbox has an access
// token, as a fork has its parent's, the client must present it (Options.Token)
// even if in changes it; later calls need a client with the new one.
func (c *Client) Init(ctx context.Context, in wire.Init) error {
	body, err := json.Marshal(in)
	if err != nil {
		return sandbox.E("guest.Init", sandbox.Invalid, "", err)
	}
	return c.simple(ctx, "guest.Init", http.MethodPost, "/init", nil, strings.NewReader(string(body)))
}

// WarmUp asks a sandbox that belongs to nobody yet for what it will be asked first:
// to start a shell, in both ways in which clients write that. Answers tell nothing:
// a root may lack a shell, and is as good without.
func (c *Client) WarmUp(ctx context.Context) {
	opts := c.opts
	opts.JSON = true
	_, _ = c.Run(ctx, Command{Args: []string{"/bin/sh", "-c", "true"}})
	_, _ = c.With(opts).Run(ctx, Command{Args: []string{"/bin/bash", "-l", "-c", "echo"}}) // as E2B's SDKs do
}

// Metrics reads what the sandbox uses, as seen from inside.
func (c *Client) Metrics(ctx context.Context) (wire.Metrics, error) {
	var m wire.Metrics
	err := c.get(ctx, "guest.Metrics", "/metrics", &m)
	return m, err
}

// Envs reads the variables that every process gets.
func (c *Client) Envs(ctx context.Context) (map[string]string, error) {
	var envs map[string]string
	err := c.get(ctx, "guest.Envs", "/envs", &envs)
	return envs, err
}

// Shutdown ends all processes, by force after the grace (whole seconds, at most
// 600), and then the agent.
func (c *Client) Shutdown(ctx context.Context, grace time.Duration) error {
	seconds := int((grace + time.Second - 1) / time.Second)
	return c.simple(ctx, "guest.Shutdown", http.MethodPost, "/shutdown", url.Values{"grace": {fmt.Sprint(seconds)}}, nil)
}

// simple makes a call whose answer says nothing.
func (c *Client) simple(ctx context.Context, op, method, path string, query url.Values, body io.Reader) error {
	header := http.Header{}
	if body != nil {
		header.Set("Content-Type", "application/json")
	}
	res, err := c.call(ctx, op, method, path, query, body, header)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// get reads a JSON answer.
func (c *Client) get(ctx context.Context, op, path string, to any) error {
	res, err := c.call(ctx, op, http.MethodGet, path, nil, nil, nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	const maxAnswer = 4 << 20 // bytes: the guest is not trusted to end
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(to); err != nil {
		return sandbox.E(op, sandbox.Internal, "", err)
	}
	return nil
}
