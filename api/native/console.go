package native

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/atoll-run/atoll/sandbox"
)

// Console is what a machine wrote to its console.
type Console struct {
	Text []byte `json:"text"`
	Next int64  `json:"next"` // number of the byte after it, for the next call
}

// Console implements Backend.
func (l *Local) Console(ctx context.Context, ref string, since int64) (Console, error) {
	text, next, err := l.node.Console(ctx, ref, since)
	return Console{Text: text, Next: next}, err
}

// Console implements Backend.
func (c *Client) Console(ctx context.Context, ref string, since int64) (Console, error) {
	return ask[Console](ctx, c, "native.Console", http.MethodGet, sandboxPath(ref, "/console"), url.Values{"since": {strconv.FormatInt(since, 10)}}, nil)
}

func (s scoped) Console(ctx context.Context, ref string, since int64) (Console, error) {
	sb, err := s.own(ctx, ref)
	if err != nil {
		return Console{}, err
	}
	return s.Backend.Console(ctx, sb.ID, since)
}

func consoleRoute() route {
	return on("GET", "/api/v1/sandboxes/{ref}/console", "What a machine wrote to its console, from a byte on", func(c *call, _ none) (Console, error) {
		text := c.r.URL.Query().Get("since")
		since, err := strconv.ParseUint("0"+text, 10, 62)
		if err != nil {
			return Console{}, sandbox.Errorf("native.Console", sandbox.Invalid, text, "since is the number of a byte")
		}
		return c.backend.Console(c.ctx, c.ref(), int64(since))
	}, "since")
}
