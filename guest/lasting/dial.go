package lasting

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Way opens a connection to the guest agent, wherever the sandbox is by now. An error that is Unavailable or Timeout will pass.
type Way func(ctx context.Context) (net.Conn, error)

const (
	firstPause, lastPause = 2 * time.Millisecond, 500 * time.Millisecond // between attempts to find the way
	// patience is how long a connection waits for the way to open again.
	patience = 15 * time.Minute
)

// Foreign reports whether Dial failed because the guest knows no lasting connections.
func Foreign(err error) bool { return errors.Is(err, errForeign) }

// Dial opens a connection to a TCP port on the sandbox's loopback; sandbox.GuestPort is the agent itself. token is the sandbox's.
func Dial(ctx context.Context, way Way, port int, token string) (*Conn, error) {
	const op = "lasting.Dial"
	if port < 1 || port > 65535 || len(token) > maxToken {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "no port %d", port)
	}
	var stream id
	_, _ = rand.Read(stream[:]) // never fails since Go 1.24
	c := newConn(stream, port)
	c.lost = func(c *Conn) { go c.seek(way, token) }
	err := c.carry(ctx, way, greeting{what: askNew, stream: stream, port: uint16(port), token: token})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// carry finds a carrier.
func (c *Conn) carry(ctx context.Context, way Way, hello greeting) error {
	const op = "lasting.Dial"
	carrier, err := way(ctx)
	if err != nil {
		return err
	}
	limit, stop := context.WithTimeout(ctx, greetTime)
	defer stop()
	ended := context.AfterFunc(limit, func() { _ = carrier.Close() })
	in := newReader(carrier)
	var said answer
	if _, err = carrier.Write(hello.encode()); err == nil {
		said, err = readAnswer(in)
	}
	switch {
	case errors.Is(err, errForeign):
		err = sandbox.E(op, sandbox.Unsupported, "", err)
	case err != nil:
		err = sandbox.E(op, sandbox.Unavailable, "", err)
	default:
		err = said.err()
	}
	if !ended() && err == nil {
		err = sandbox.E(op, sandbox.Unavailable, "", limit.Err())
	}
	if ctx.Err() != nil {
		err = sandbox.E(op, "", "", ctx.Err())
	}
	if err == nil {
		if err = c.attach(carrier, in, said.received); err != nil {
			err = sandbox.E(op, sandbox.NotFound, "", err)
		}
	}
	if err != nil {
		_ = carrier.Close()
	}
	return err
}

// seek looks for another carrier until there is one, or none will ever be.
func (c *Conn) seek(way Way, token string) {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	lingers := false
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		c.mu.Lock()
		hello := greeting{what: askResume, stream: c.id, port: uint16(c.port), received: c.received, token: token}
		over, idle := c.over, c.closed && c.acked >= c.written
		c.mu.Unlock()
		if over {
			return
		}
		if idle && !lingers { // it is over but for saying so
			lingers = true
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, linger)
			defer cancel()
		}
		err := c.carry(ctx, way, hello)
		if err == nil {
			return
		}
		if !passing(err) {
			c.fail(fmt.Errorf("%w: %w", errEnded, err))
			return
		}
		select {
		case <-ctx.Done():
			c.fail(errEnded)
			return
		case <-c.done:
			return
		case <-time.After(pause):
		}
	}
}

// passing reports whether an error will pass by itself.
func passing(err error) bool {
	return sandbox.Is(err, sandbox.Unavailable) || sandbox.Is(err, sandbox.Timeout) || sandbox.Is(err, sandbox.Exhausted)
}
