// Package lasting makes connections into a sandbox that outlive the way to it.
//
// A connection is carried by another one, from a node to the guest agent. When that breaks, since the sandbox was saved and
// goes on elsewhere, the node reaches for the guest anew and both say what they have received; what was lost on the way is sent
// again. So whoever uses the connection, on either side, sees a pause and nothing else.
//
// What was written is kept until the other end has taken it, and no more is kept than a window.
package lasting

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
	// window is how many bytes are written ahead of what the other end took.
	window = 512 << 10
	// batch is how many bytes are gathered for one write to a carrier.
	batch = 64 << 10
	// linger is how long a closed connection without a carrier goes on looking for one when all was sent.
	linger = 30 * time.Second
)

// errEnded is what is wrong with a connection whose carriers came to an end.
var errEnded = fmt.Errorf("the way into the sandbox is lost: %w", syscall.ECONNRESET)

// Conn is one connection. It is a net.Conn with CloseWrite, and may be used from several goroutines.
type Conn struct {
	id     id
	port   int
	lost   func(*Conn) // called, without mu, when the carrier broke and another is wanted
	forget func(*Conn) // called, without mu, when nothing is left to be done; once
	done   chan struct{}

	mu      sync.Mutex
	changed *sync.Cond

	// What is sent has numbers: each byte one, the end of data one, and the closing one.
	out     buffer // written, and not known to be taken: the last of the bytes up to written
	written int64  // bytes, ever
	acked   int64  // all below was taken by the other end
	sent    int64  // all below was given to the present carrier
	finish  bool   // no more data will be written
	closed  bool   // nor read: by our side

	in       buffer // received and not read yet
	received int64  // all below was
	told     int64  // the other end knows that all below was taken
	eof      bool   // no more data will come
	gone     bool   // the other end reads no more

	carrier net.Conn // nil: none
	fault   error    // ends everything
	over    bool     // forget was called

	readBy, writeBy timeout.Limit
}

func newConn(stream id, port int) *Conn {
	c := &Conn{id: stream, port: port, done: make(chan struct{})}
	c.changed = sync.NewCond(&c.mu)
	return c
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.readBy.Passed():
			return 0, os.ErrDeadlineExceeded
		case c.in.size() > 0 || len(p) == 0:
			n := copy(p, c.in.bytes())
			c.in.drop(n)
			if c.owes() {
				c.changed.Broadcast()
			}
			return n, nil
		case c.eof:
			return 0, io.EOF
		case c.fault != nil:
			return 0, c.fault
		}
		c.changed.Wait()
	}
}

// Write implements net.Conn. What it took arrives, unless the sandbox or this process ends.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
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
		if room := window - c.out.size(); room > 0 {
			n := min(room, len(p)-done)
			c.out.add(p[done : done+n])
			c.written += int64(n)
			done += n
			c.changed.Broadcast()
			continue
		}
		c.changed.Wait()
	}
}

// CloseWrite says that nothing more will be written.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.finish = true
	c.changed.Broadcast()
	return nil
}

// Close ends the connection. What was written still arrives.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	c.finish, c.closed, c.in = true, true, buffer{}
	c.readBy.Set(time.Time{}, c.changed)
	c.writeBy.Set(time.Time{}, c.changed)
	c.settle()
	return nil
}

// fail ends everything: no carrier will come.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.fault == nil {
		c.fault = err
	}
	c.changed.Broadcast()
	c.settle()
}

// settle lets go of the connection when nothing is left to be done. It releases mu, which is held.
func (c *Conn) settle() {
	all := c.closed && (c.acked == c.end() || c.gone && c.told == c.received)
	over := !c.over && (c.fault != nil || all)
	carrier := c.carrier
	if over {
		c.over, c.out, c.carrier = true, buffer{}, nil
		if c.fault == nil {
			c.fault = net.ErrClosed
		}
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	if !over {
		return
	}
	if carrier != nil {
		_ = carrier.Close()
	}
	close(c.done)
	if c.forget != nil {
		c.forget(c)
	}
}

// end is the number after the last thing that is to be sent so far. mu is held.
func (c *Conn) end() int64 {
	n := c.written
	if c.finish {
		n++
	}
	if c.closed {
		n++
	}
	return n
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return addr(c.port) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return addr(c.port) }

// addr is the port that a connection is to.
type addr int

func (addr) Network() string  { return "lasting" }
func (a addr) String() string { return fmt.Sprintf("lasting:%d", int(a)) }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.limit(&c.readBy, t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.limit(&c.writeBy, t) }

func (c *Conn) limit(l *timeout.Limit, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	l.Set(t, c.changed)
	return nil
}

// buffer is a queue of bytes. Its zero value is empty, and an empty one holds no memory.
type buffer struct {
	b    []byte
	from int // what is before was dropped
}

func (b *buffer) size() int     { return len(b.b) - b.from }
func (b *buffer) bytes() []byte { return b.b[b.from:] }

// add appends. Whatever was dropped makes room before more is asked for, once that costs no more than it gives.
func (b *buffer) add(p []byte) {
	if b.from >= b.size() && len(b.b)+len(p) > cap(b.b) {
		b.b = b.b[:copy(b.b, b.bytes())]
		b.from = 0
	}
	b.b = append(b.b, p...)
}

func (b *buffer) drop(n int) {
	if b.from += n; b.from == len(b.b) {
		*b = buffer{}
	}
}
