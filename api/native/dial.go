package native

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// upgrade is the protocol that a dial switches to: the bytes of one TCP
// connection, nothing added.
const upgrade = "tcp"

// handshake bounds how long a dial may take to be answered.
const handshake = 60 * time.Second

// serveDial connects the client's HTTP connection to a port of a sandbox. The
// sandbox is dialled first, so that a failure is an ordinary answer.
func serveDial(c *call) error {
	const op = "native.Dial"
	port, err := strconv.Atoi(c.r.PathValue("port"))
	if err != nil || port < 1 || port > 65535 {
		return sandbox.Errorf(op, sandbox.Invalid, c.r.PathValue("port"), "a port is a number from 1 to 65535")
	}
	if c.r.Header.Get("Upgrade") != upgrade {
		return sandbox.Errorf(op, sandbox.Invalid, "", "the request must ask for `Upgrade: %s`", upgrade)
	}
	inside, err := c.backend.Dial(c.ctx, c.r.PathValue("ref"), port)
	if err != nil {
		return err
	}
	client, buffered, err := http.NewResponseController(c.w).Hijack()
	if err != nil {
		inside.Close()
		return sandbox.E(op, sandbox.Unsupported, "", err).WithHint("dial over HTTP/1.1")
	}
	// The server's own deadlines do not hold for a stream.
	_ = client.SetDeadline(time.Time{})
	_, err = io.WriteString(client, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+upgrade+"\r\n\r\n")
	if err != nil {
		inside.Close()
		client.Close()
		return nil // the client has gone and the connection is ours: nobody to tell
	}
	node.Splice(&bufferedConn{Conn: client, r: buffered.Reader}, inside)
	return nil
}

// dialUpgrade performs the client's half of serveDial. It speaks HTTP itself,
// since net/http's client hides the connection and with it CloseWrite.
func dialUpgrade(ctx context.Context, base *url.URL, header http.Header, path string) (net.Conn, error) {
	const op = "native.Dial"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath("/api/v1").String()+path, nil)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, path, err)
	}
	req.Header = header.Clone()
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", upgrade)

	conn, err := dialBase(ctx, base)
	if err != nil {
		return nil, sandbox.E(op, kindOfTransport(err), base.Host, err)
	}
	// A caller that gives up must not hang in the handshake.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(handshake))
	if err := req.Write(conn); err != nil {
		conn.Close()
		return nil, sandbox.E(op, kindOfTransport(err), base.Host, errors.Join(ctx.Err(), err))
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		conn.Close()
		return nil, sandbox.E(op, kindOfTransport(errors.Join(ctx.Err(), err)), base.Host, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer conn.Close()
		return nil, readProblem(op, resp)
	}
	if !stop() {
		conn.Close()
		return nil, sandbox.E(op, "", base.Host, ctx.Err())
	}
	_ = conn.SetDeadline(time.Time{})
	return &bufferedConn{Conn: conn, r: r}, nil
}

func dialBase(ctx context.Context, base *url.URL) (net.Conn, error) {
	host := base.Host
	if base.Port() == "" {
		host = net.JoinHostPort(base.Hostname(), base.Scheme) // "http" and "https" name their ports
	}
	if base.Scheme == "https" {
		return (&tls.Dialer{Config: &tls.Config{ServerName: base.Hostname(), NextProtos: []string{"http/1.1"}}}).DialContext(ctx, "tcp", host)
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", host)
}

// bufferedConn is a connection whose first bytes are already in a buffer.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// CloseWrite tells the other side that no more comes, if the connection can.
func (c *bufferedConn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
