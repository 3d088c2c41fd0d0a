package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
)

// ranges reads a file behind an HTTP address at any place. Reads that go forward
// share one response, since weights are read in nearly the order of the file; a
// connection that breaks, or over which nothing comes, is taken up again where it
// broke. It is used by one goroutine at a time.
type ranges struct {
	ctx     context.Context
	url     string
	size    int64
	tag     string        // the server's name for this content; "" when it has none
	patient time.Duration // without a byte, before a connection counts as broken

	body io.ReadCloser // nil when there is none
	at   int64         // what body gives next
	stop func()        // ends the request of body
}

const (
	maxSkip    = 1 << 20 // bytes that are read and thrown away rather than asking anew
	maxRetries = 5       // without a byte in between
	retryAfter = 200 * time.Millisecond
	stallAfter = 30 * time.Second
)

// A remote is a model behind one address, or one for each of its parts.
type remote struct {
	io.ReaderAt
	parts []*ranges
}

// Close gives up all connections.
func (r *remote) Close() error {
	for _, p := range r.parts {
		p.drop()
	}
	return nil
}

// openURL reads the front of a model behind an address, and of all its parts if that is the address of one.
func openURL(ctx context.Context, url string) (front *gguf.File, _ *remote, err error) {
	names := gguf.PartNames(url)
	if len(names) == 0 {
		names = []string{url}
	}
	whole := &remote{}
	defer func() {
		if err != nil {
			_ = whole.Close()
		}
	}()
	var fronts []*gguf.File
	var data []io.ReaderAt
	var sizes []int64
	for _, name := range names {
		r, err := openRanges(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		whole.parts, data, sizes = append(whole.parts, r), append(data, r), append(sizes, r.size)
		if front, err = gguf.Decode(io.NewSectionReader(r, 0, r.size), r.size); err != nil {
			return nil, nil, err
		}
		fronts = append(fronts, front)
	}
	whole.ReaderAt = gguf.Concat(data, sizes)
	if len(names) > 1 {
		if front, err = gguf.Join(fronts, sizes); err != nil {
			return nil, nil, sandbox.E("host.openURL", sandbox.Invalid, url, err)
		}
	}
	return front, whole, nil
}

// openRanges asks for the size. It fails with Unsupported when the server does not
// serve parts of files.
func openRanges(ctx context.Context, url string) (*ranges, error) {
	const op = "host.openRanges"
	r := &ranges{ctx: ctx, url: url, patient: stallAfter}
	res, err := r.ask(0)
	if err != nil {
		return nil, err
	}
	r.tag = res.Header.Get("ETag")
	_, total, ok := strings.Cut(res.Header.Get("Content-Range"), "/")
	r.size, err = strconv.ParseInt(total, 10, 64)
	if !ok || err != nil || r.size <= 0 {
		_ = res.Body.Close()
		r.drop()
		return nil, sandbox.Errorf(op, sandbox.Unsupported, url, "the server does not say how long the file is")
	}
	r.body, r.at = res.Body, 0
	return r, nil
}

// ask begins a response. drop ends it.
func (r *ranges) ask(from int64) (*http.Response, error) {
	const op = "host.ranges"
	ctx, stop := context.WithCancel(r.ctx)
	r.stop = stop
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		r.drop()
		return nil, sandbox.E(op, sandbox.Invalid, r.url, err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	if r.tag != "" && !strings.HasPrefix(r.tag, "W/") {
		req.Header.Set("If-Match", r.tag)
	}
	stalled := time.AfterFunc(r.patient, stop)
	res, err := http.DefaultClient.Do(req)
	stalled.Stop()
	if err != nil {
		r.drop()
		return nil, sandbox.E(op, sandbox.Unavailable, r.url, err)
	}
	changed := r.size > 0 && (res.Header.Get("ETag") != r.tag || !strings.HasSuffix(res.Header.Get("Content-Range"), fmt.Sprintf("/%d", r.size)))
	if res.StatusCode == http.StatusPartialContent && !changed {
		return res, nil
	}
	_ = res.Body.Close()
	r.drop()
	if res.StatusCode == http.StatusPartialContent || res.StatusCode == http.StatusPreconditionFailed {
		return nil, sandbox.Errorf(op, sandbox.Conflict, r.url, "the file has changed on its server while it was read").WithHint("load it again")
	}
	kind := sandbox.NotFound
	switch {
	case res.StatusCode == http.StatusOK:
		return nil, sandbox.Errorf(op, sandbox.Unsupported, r.url, "the server does not serve parts of files").
			WithHint("import the model first")
	case res.StatusCode >= http.StatusInternalServerError:
		kind = sandbox.Unavailable
	}
	return nil, sandbox.Errorf(op, kind, r.url, "the server answered %s", res.Status)
}

// ReadAt implements io.ReaderAt.
func (r *ranges) ReadAt(p []byte, off int64) (int, error) {
	done, failures := 0, 0
	for done < len(p) {
		n, err := r.some(p[done:], off+int64(done))
		done += n
		if n > 0 {
			failures = 0
		}
		if err == nil || done == len(p) {
			continue
		}
		r.drop()
		if !sandbox.Is(err, sandbox.Unavailable) || r.ctx.Err() != nil {
			return done, err
		}
		if failures++; failures > maxRetries {
			return done, err
		}
		select {
		case <-time.After(retryAfter << failures):
		case <-r.ctx.Done():
			return done, sandbox.E("host.ranges", "", r.url, r.ctx.Err())
		}
	}
	return done, nil
}

// some reads at least a byte.
func (r *ranges) some(p []byte, off int64) (int, error) {
	if off >= r.size {
		return 0, sandbox.E("host.ranges", sandbox.Invalid, r.url, io.ErrUnexpectedEOF)
	}
	if r.body != nil && off >= r.at && off-r.at <= maxSkip {
		stalled := time.AfterFunc(r.patient, r.stop)
		n, err := io.CopyN(io.Discard, r.body, off-r.at)
		stalled.Stop()
		r.at += n
		if err != nil {
			return 0, sandbox.E("host.ranges", sandbox.Unavailable, r.url, err)
		}
	} else {
		r.drop()
		res, err := r.ask(off) //nolint:bodyclose // kept in r.body until drop
		if err != nil {
			return 0, err
		}
		r.body, r.at = res.Body, off
	}
	stalled := time.AfterFunc(r.patient, r.stop)
	n, err := r.body.Read(p)
	stalled.Stop()
	r.at += int64(n)
	if err != nil && (n == 0 || !errors.Is(err, io.EOF)) {
		return n, sandbox.E("host.ranges", sandbox.Unavailable, r.url, err)
	}
	return n, nil
}

func (r *ranges) drop() {
	if r.stop != nil {
		r.stop()
		r.stop = nil
	}
	if r.body != nil {
		_ = r.body.Close()
		r.body = nil
	}
}
