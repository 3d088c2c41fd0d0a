package guest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// DialPort opens a connection to a TCP port on the sandbox's loopback, through
// the agent. It is for runtimes whose only way in is the agent itself. The
// client must have been made by New. The error is Unavailable when nothing
// listens on the port.
func (c *Client) DialPort(ctx context.Context, port int) (net.Conn, error) {
	const op = "guest.DialPort"
	if c.dial == nil {
		return nil, sandbox.Errorf(op, sandbox.Unsupported, "", "not through a proxy")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/connect?port=%d", c.base, port), nil)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", wire.UpgradeProtocol)
	c.present(req)
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, transportError(op, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	res, in, err := handshake(conn, req)
	if err == nil && res.StatusCode == http.StatusSwitchingProtocols {
		if !stop() {
			conn.Close()
			return nil, sandbox.E(op, sandbox.KindOf(ctx.Err()), "", ctx.Err())
		}
		return &tunnel{Conn: conn, in: in}, nil
	}
	defer conn.Close()
	if err != nil {
		return nil, transportError(op, err)
	}
	defer res.Body.Close()
	return nil, statusError(op, res)
}

func handshake(conn net.Conn, req *http.Request) (*http.Response, *bufio.Reader, error) {
	if err := req.Write(conn); err != nil {
		return nil, nil, err
	}
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, req)
	return res, in, err
}

// tunnel is a connection whose first bytes may have been read already.
type tunnel struct {
	net.Conn
	in *bufio.Reader
}

func (t *tunnel) Read(b []byte) (int, error) { return t.in.Read(b) }

// CloseWrite ends the direction to the service, where the connection below can.
func (t *tunnel) CloseWrite() error {
	if half, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
