package serial

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/guest/timeout"
)

const (
	// window is how many bytes of a stream the other end may send before we say
	// that we read them.
	window = 256 << 10
	// sendBuffer is how many bytes Write takes before the port did.
	sendBuffer = 64 << 10
	// linger is how long a closed connection goes on sending what was written.
	linger = 5 * time.Second
)

// Conn is one connection. It is a net.Conn with CloseWrite, and may be used from
// several goroutines.
type Conn struct {
	m    *mux
	id   uint32
	port int

	// All below is guarded by m.mu; changed is told of every change.
	changed *sync.Cond
	in      []byte // received and not read yet, at most window
	owed    int    // bytes read that the other end does not know of
	out     []byte // written and not sent yet, at most sendBuffer
	credit  int    // bytes that the other end still takes
	queued  bool   // in m.ready
	opened  bool   // the guest accepted; from the start in the guest

	finish, finished bool // no more data is to be sent; that was said
	eof              bool // no more data will come
	closed           bool // by our side
	gone             bool // the other end forgot the stream, or the epoch is over
	fault            error

	readBy, writeBy timeout.Limit
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.readBy.Passed():
			return 0, os.ErrDeadlineExceeded
		case len(c.in) > 0 || len(p) == 0:
			n := copy(p, c.in)
			c.in = c.in[n:]
			if len(c.in) == 0 {
				c.in = nil // idle connections hold no memory
			}
			if c.owed += n; c.owed >= window/2 && !c.eof && !c.gone {
				c.m.enqueue(c)
			}
			return n, nil
		case c.fault != nil:
			return 0, c.fault
		case c.eof || c.gone:
			return 0, io.EOF
		}
		c.changed.Wait()
	}
}

// Write implements net.Conn. What it took may still be lost with the machine.
func (c *Conn) Write(p []byte) (int, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for done := 0; ; {
		switch {
		case c.closed || c.finish:
			return done, net.ErrClosed
		case c.fault != nil:
			return done, c.fault
		case c.gone:
			return done, syscall.EPIPE
		case c.writeBy.Passed():
			return done, os.ErrDeadlineExceeded
		case done == len(p):
			return done, nil
		}
		if room := sendBuffer - len(c.out); room > 0 {
			n := min(room, len(p)-done)
			c.out = append(c.out, p[done:done+n]...)
			done += n
			c.m.enqueue(c)
			continue
		}
		c.changed.Wait()
	}
}

// CloseWrite says that nothing more will be written.
func (c *Conn) CloseWrite() error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.finish = true
	c.m.enqueue(c)
	c.changed.Broadcast()
	return nil
}

// Close ends the connection. What was written is still sent, for a while.
func (c *Conn) Close() error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	c.in = nil
	c.readBy.Set(time.Time{}, c.changed)
	c.writeBy.Set(time.Time{}, c.changed)
	if c.gone {
		c.m.forget(c)
		return nil
	}
	c.m.enqueue(c)
	if len(c.out) > 0 {
		time.AfterFunc(linger, func() {
			c.m.mu.Lock()
			defer c.m.mu.Unlock()
			c.out = nil
			c.m.enqueue(c)
		})
	}
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return addr(c.port) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return addr(c.port) }

// addr is the port that a connection is to.
type addr int

func (addr) Network() string  { return "serial" }
func (a addr) String() string { return fmt.Sprintf("serial:%d", int(a)) }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readBy, t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeBy, t) }

func (c *Conn) setDeadline(d *timeout.Limit, t time.Time) error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	d.Set(t, c.changed)
	return nil
}
