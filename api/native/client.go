package native

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// Client is the Backend of a node behind HTTP. It is safe for many goroutines.
type Client struct {
	base   *url.URL
	header http.Header
	http   *http.Client
}

var _ Backend = (*Client)(nil)

// NewClient returns a client of the daemon at addr, which is "host:port" or a
// URL, that authenticates with key. It does not connect yet.
func NewClient(addr, key string) (*Client, error) {
	if !strings.Contains(addr, "://") {
		addr = "http://" + addr
	}
	base, err := url.Parse(addr)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, sandbox.Errorf("native.NewClient", sandbox.Invalid, addr, "not an address of a daemon").
			WithHint("write host:port or a URL such as https://node.example.com:7700")
	}
	// Streams may last for hours, so there is no overall time-out: the
	// context of each call bounds it.
	transport := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       time.Minute,
		ExpectContinueTimeout: time.Second,
		Proxy:                 http.ProxyFromEnvironment,
	}
	return &Client{base: base, header: http.Header{"X-Api-Key": {key}}, http: &http.Client{Transport: transport}}, nil
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// send makes a request and returns an answer that is not an error. in is an
// io.Reader to stream, a value to send as JSON, or nil.
func (c *Client) send(ctx context.Context, op, method, path string, query url.Values, in any) (*http.Response, error) {
	switch in := in.(type) {
	case nil:
		return c.sendBody(ctx, op, method, path, query, nil, "")
	case io.Reader:
		return c.sendBody(ctx, op, method, path, query, in, "application/octet-stream")
	}
	data, err := json.Marshal(in)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	return c.sendBody(ctx, op, method, path, query, bytes.NewReader(data), "application/json")
}

func (c *Client) sendBody(ctx context.Context, op, method, path string, query url.Values, body io.Reader, contentType string) (*http.Response, error) {
	target := c.base.JoinPath("/api/v1").String() + path // path is escaped already
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, path, err)
	}
	req.Header = c.header.Clone()
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the URL is in the subject
		}
		e := sandbox.E(op, kindOfTransport(err), c.base.Host, err)
		if e.Kind == sandbox.Unavailable {
			e.Hint = "is the daemon running? start it with `atoll up`"
		}
		return nil, e
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		return nil, readProblem(op, resp)
	}
	return resp, nil
}

// ask makes a request that is answered by one JSON value.
func ask[Out any](ctx context.Context, c *Client, op, method, path string, query url.Values, in any) (Out, error) {
	var out Out
	resp, err := c.send(ctx, op, method, path, query, in)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, sandbox.E(op, kindOfTransport(err), c.base.Host, err)
	}
	return out, nil
}

// tell makes a request whose answer has no body.
func (c *Client) tell(ctx context.Context, op, method, path string, query url.Values, in any) error {
	resp, err := c.send(ctx, op, method, path, query, in)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// download copies an answer's body to w. A stream that the daemon breaks off
// is an error, since the server aborts the connection when it fails midway.
func (c *Client) download(ctx context.Context, op, path string, query url.Values, w io.Writer) error {
	resp, err := c.send(ctx, op, http.MethodGet, path, query, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return sandbox.E(op, kindOfTransport(err), c.base.Host, err)
	}
	return nil
}

// follow makes a request whose answer is a stream of progress and a result.
func follow[P, R any](ctx context.Context, c *Client, op, path string, query url.Values, in any, report func(P)) (R, error) {
	resp, err := c.send(ctx, op, http.MethodPost, path, query, in)
	if err != nil {
		var zero R
		return zero, err
	}
	defer resp.Body.Close()
	return readProgress[P, R](op, resp.Body, report)
}

// sandboxPath is the path of a sandbox's resource.
func sandboxPath(ref, rest string) string { return "/sandboxes/" + url.PathEscape(ref) + rest }

// Create implements Backend.
func (c *Client) Create(ctx context.Context, req node.CreateRequest) (node.Sandbox, error) {
	return ask[node.Sandbox](ctx, c, "native.Create", http.MethodPost, "/sandboxes", nil, req)
}

// Run implements Backend.
func (c *Client) Run(ctx context.Context, req node.RunRequest, report func(node.RunEvent)) (node.Sandbox, error) {
	return follow[node.RunEvent, node.Sandbox](ctx, c, "native.Run", "/run", nil, req, report)
}

// Get implements Backend.
func (c *Client) Get(ctx context.Context, ref string) (node.Sandbox, error) {
	return ask[node.Sandbox](ctx, c, "native.Get", http.MethodGet, sandboxPath(ref, ""), nil, nil)
}

// List implements Backend.
func (c *Client) List(ctx context.Context, f node.Filter) ([]node.Sandbox, error) {
	return ask[[]node.Sandbox](ctx, c, "native.List", http.MethodGet, "/sandboxes", filterQuery(f), nil)
}

// Remove implements Backend.
func (c *Client) Remove(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.Remove", http.MethodDelete, sandboxPath(ref, ""), nil, nil)
}

// Pause implements Backend.
func (c *Client) Pause(ctx context.Context, ref string, mode node.PauseMode) (node.Sandbox, error) {
	return ask[node.Sandbox](ctx, c, "native.Pause", http.MethodPost, sandboxPath(ref, "/pause"), nil, PauseRequest{Mode: mode})
}

// Resume implements Backend.
func (c *Client) Resume(ctx context.Context, ref string) (node.Sandbox, error) {
	return ask[node.Sandbox](ctx, c, "native.Resume", http.MethodPost, sandboxPath(ref, "/resume"), nil, nil)
}

// Rename implements Backend.
func (c *Client) Rename(ctx context.Context, ref, name string) error {
	return c.tell(ctx, "native.Rename", http.MethodPost, sandboxPath(ref, "/rename"), nil, NameRequest{Name: name})
}

// SetTimeout implements Backend.
func (c *Client) SetTimeout(ctx context.Context, ref string, d time.Duration) error {
	return c.tell(ctx, "native.SetTimeout", http.MethodPost, sandboxPath(ref, "/timeout"), nil, TimeoutRequest{Timeout: d})
}

// UpdateNetwork implements Backend.
func (c *Client) UpdateNetwork(ctx context.Context, ref string, p sandbox.NetworkPolicy) error {
	return c.tell(ctx, "native.UpdateNetwork", http.MethodPut, sandboxPath(ref, "/network"), nil, p)
}

// Fork implements Backend.
func (c *Client) Fork(ctx context.Context, ref string, count int, req node.CreateRequest) ([]node.ForkResult, error) {
	forks, err := ask[[]Fork](ctx, c, "native.Fork", http.MethodPost, sandboxPath(ref, "/fork"), nil, ForkRequest{Count: count, Request: req})
	results := make([]node.ForkResult, len(forks))
	for i, f := range forks {
		results[i].Sandbox = f.Sandbox
		if f.Problem != nil {
			results[i].Err = f.Problem.Err()
		}
	}
	return results, err
}

// Stats implements Backend.
func (c *Client) Stats(ctx context.Context, ref string) (sandbox.Stats, error) {
	return ask[sandbox.Stats](ctx, c, "native.Stats", http.MethodGet, sandboxPath(ref, "/stats"), nil, nil)
}

// Wait implements Backend.
func (c *Client) Wait(ctx context.Context, ref string, states ...sandbox.State) (node.Sandbox, error) {
	query := url.Values{}
	for _, s := range states {
		query.Add("state", string(s))
	}
	return ask[node.Sandbox](ctx, c, "native.Wait", http.MethodGet, sandboxPath(ref, "/wait"), query, nil)
}

// Dial implements Backend.
func (c *Client) Dial(ctx context.Context, ref string, port int) (net.Conn, error) {
	return dialUpgrade(ctx, c.base, c.header, sandboxPath(ref, "/dial/"+strconv.Itoa(port)))
}

// Changes implements Backend.
func (c *Client) Changes(ctx context.Context, ref string, w io.Writer) error {
	return c.download(ctx, "native.Changes", sandboxPath(ref, "/changes"), nil, w)
}

// Expose implements Backend.
func (c *Client) Expose(ctx context.Context, ref string, p node.Port) (node.Port, error) {
	return ask[node.Port](ctx, c, "native.Expose", http.MethodPost, sandboxPath(ref, "/ports"), nil, p)
}

// Unexpose implements Backend.
func (c *Client) Unexpose(ctx context.Context, ref string, guestPort int) error {
	return c.tell(ctx, "native.Unexpose", http.MethodDelete, sandboxPath(ref, "/ports/"+strconv.Itoa(guestPort)), nil, nil)
}

// Snapshot implements Backend.
func (c *Client) Snapshot(ctx context.Context, ref, name string) (node.Snapshot, error) {
	return ask[node.Snapshot](ctx, c, "native.Snapshot", http.MethodPost, sandboxPath(ref, "/snapshots"), nil, NameRequest{Name: name})
}

// Restore implements Backend.
func (c *Client) Restore(ctx context.Context, ref string, req node.CreateRequest) (node.Sandbox, error) {
	return ask[node.Sandbox](ctx, c, "native.Restore", http.MethodPost, "/snapshots/"+url.PathEscape(ref)+"/restore", nil, req)
}

// Snapshots implements Backend.
func (c *Client) Snapshots(ctx context.Context, sandboxRef string) ([]node.Snapshot, error) {
	return ask[[]node.Snapshot](ctx, c, "native.Snapshots", http.MethodGet, "/snapshots", queryOf("sandbox", sandboxRef), nil)
}

// GetSnapshot implements Backend.
func (c *Client) GetSnapshot(ctx context.Context, ref string) (node.Snapshot, error) {
	return ask[node.Snapshot](ctx, c, "native.GetSnapshot", http.MethodGet, "/snapshots/"+url.PathEscape(ref), nil, nil)
}

// RemoveSnapshot implements Backend.
func (c *Client) RemoveSnapshot(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.RemoveSnapshot", http.MethodDelete, "/snapshots/"+url.PathEscape(ref), nil, nil)
}

// Info implements Backend.
func (c *Client) Info(ctx context.Context) (node.Info, error) {
	return ask[node.Info](ctx, c, "native.Info", http.MethodGet, "/info", nil, nil)
}

// Runtimes implements Backend.
func (c *Client) Runtimes(ctx context.Context) ([]node.RuntimeInfo, error) {
	return ask[[]node.RuntimeInfo](ctx, c, "native.Runtimes", http.MethodGet, "/runtimes", nil, nil)
}

// maxEventQueue bounds how many events wait for a slow reader; then the daemon
// is no longer read, and its own bound holds.
const maxEventQueue = 64

// Events implements Backend.
func (c *Client) Events(ctx context.Context, since uint64) (<-chan sandbox.Event, error) {
	resp, err := c.send(ctx, "native.Events", http.MethodGet, "/events", queryOf("since", strconv.FormatUint(since, 10)), nil)
	if err != nil {
		return nil, err
	}
	events := make(chan sandbox.Event, maxEventQueue)
	go func() {
		defer close(events)
		defer resp.Body.Close()
		for dec := json.NewDecoder(resp.Body); ; {
			var e sandbox.Event
			if dec.Decode(&e) != nil {
				return
			}
			select {
			case events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return events, nil
}

// Pools implements Backend.
func (c *Client) Pools(ctx context.Context) ([]node.Pool, error) {
	return ask[[]node.Pool](ctx, c, "native.Pools", http.MethodGet, "/pools", nil, nil)
}

// SetPool implements Backend.
func (c *Client) SetPool(ctx context.Context, template string, size int) error {
	return c.tell(ctx, "native.SetPool", http.MethodPut, "/pools/"+url.PathEscape(template), nil, PoolRequest{Size: size})
}

// Prune implements Backend.
func (c *Client) Prune(ctx context.Context) (node.PruneReport, error) {
	return ask[node.PruneReport](ctx, c, "native.Prune", http.MethodPost, "/prune", nil, nil)
}

// CreateKey implements Backend.
func (c *Client) CreateKey(ctx context.Context, team, name string) (NewKey, error) {
	return ask[NewKey](ctx, c, "native.CreateKey", http.MethodPost, "/keys", nil, KeyRequest{Team: team, Name: name})
}

// Keys implements Backend.
func (c *Client) Keys(ctx context.Context) ([]tenant.Key, error) {
	return ask[[]tenant.Key](ctx, c, "native.Keys", http.MethodGet, "/keys", nil, nil)
}

// RevokeKey implements Backend.
func (c *Client) RevokeKey(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.RevokeKey", http.MethodDelete, "/keys/"+url.PathEscape(ref), nil, nil)
}

// queryOf is a query of one parameter, left out when its value is empty.
func queryOf(name, value string) url.Values {
	if value == "" {
		return nil
	}
	return url.Values{name: {value}}
}

// filterQuery and filterOf are each other's inverse.
func filterQuery(f node.Filter) url.Values {
	q := url.Values{}
	set := func(name, value string) {
		if value != "" {
			q.Set(name, value)
		}
	}
	set("team", f.Team)
	set("template", f.Template)
	if f.All {
		q.Set("all", "true")
	}
	for _, s := range f.States {
		q.Add("state", string(s))
	}
	for k, v := range f.Metadata {
		q.Add("metadata", k+"="+v)
	}
	return q
}

func filterOf(q url.Values) (node.Filter, error) {
	f := node.Filter{Team: q.Get("team"), Template: q.Get("template"), All: q.Get("all") == "true"}
	for _, s := range q["state"] {
		f.States = append(f.States, sandbox.State(s))
	}
	for _, kv := range q["metadata"] {
		k, v, ok := strings.Cut(kv, "=")
		if !ok {
			return f, sandbox.Errorf("native.List", sandbox.Invalid, kv, "a metadata filter is written key=value")
		}
		if f.Metadata == nil {
			f.Metadata = make(map[string]string)
		}
		f.Metadata[k] = v
	}
	return f, nil
}
