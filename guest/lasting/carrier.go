package lasting

import (
	"bufio"
	"fmt"
	"net"
)

// attach gives the connection a carrier, whose other end has received all below theirs and awaits frames. in is what reads it.
// It fails when not that much is kept.
func (c *Conn) attach(carrier net.Conn, in *bufio.Reader, theirs int64) error {
	c.mu.Lock()
	if c.fault != nil || theirs < c.acked || theirs > c.end() {
		err := c.fault
		c.mu.Unlock()
		if err == nil {
			err = fmt.Errorf("the other end has received %d of %d", theirs, c.end())
		}
		return err
	}
	c.carrier = carrier
	c.take(theirs)
	c.sent, c.told = theirs, c.received
	go c.write(carrier)
	go c.read(carrier, in)
	c.settle()
	return nil
}

// detach takes the carrier away, if there is one: what still comes over it counts no more.
func (c *Conn) detach() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.carrier != nil {
		_ = c.carrier.Close()
		c.carrier = nil
		c.changed.Broadcast()
	}
}

// state is how much has been received, and whether all from theirs on is still kept.
func (c *Conn) state(theirs int64) (received int64, kept bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.received, c.fault == nil && theirs >= c.acked && theirs <= c.end()
}

// take notes that all below n has arrived. mu is held.
func (c *Conn) take(n int64) {
	from := min(c.acked, c.written)
	c.acked = n
	c.out.drop(int(min(n, c.written) - from))
}

// broke takes a carrier away that failed.
func (c *Conn) broke(carrier net.Conn) {
	_ = carrier.Close()
	c.mu.Lock()
	if c.carrier != carrier {
		c.mu.Unlock()
		return
	}
	c.carrier = nil
	c.changed.Broadcast()
	wanted := !c.over && !c.gone
	if c.gone && c.fault == nil {
		c.fault = errEnded // for one that still writes; nothing more will come
	}
	if !wanted {
		c.settle()
		return
	}
	c.mu.Unlock()
	c.lost(c)
}

// taken is how much the other end may know to be taken: what was read, and the ends once all was. mu is held.
func (c *Conn) taken() int64 {
	if c.closed {
		return c.received
	}
	n := c.received - int64(c.in.size())
	if c.in.size() > 0 && c.eof { // the ends come after the bytes
		n--
		if c.gone {
			n--
		}
	}
	return n
}

// owes reports whether the other end should be told what was taken. mu is held.
func (c *Conn) owes() bool {
	n := c.taken() - c.told
	return n >= window/4 || n > 0 && (c.eof || c.closed)
}

// write sends over a carrier until that breaks or is replaced.
func (c *Conn) write(carrier net.Conn) {
	var buf []byte
	for {
		var over bool
		if buf, over = c.gather(carrier, buf[:0]); over {
			return
		}
		if _, err := carrier.Write(buf); err != nil {
			c.broke(carrier)
			return
		}
		c.mu.Lock()
		c.settle()
	}
}

// gather waits until there is something to send over a carrier and appends up to about batch bytes of it.
func (c *Conn) gather(carrier net.Conn, buf []byte) (frames []byte, over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.carrier != carrier {
			return buf, true
		}
		if c.owes() {
			c.told = c.taken()
			buf = appendAck(buf, c.told)
		}
		for len(buf) < batch && c.sent < c.end() && !c.gone {
			switch {
			case c.sent < c.written:
				rest := c.out.bytes()[c.sent-(c.written-int64(c.out.size())):]
				n := min(len(rest), maxData)
				buf = appendFrame(buf, kindData, rest[:n])
				c.sent += int64(n)
			case c.sent == c.written:
				buf = appendFrame(buf, kindFinish, nil)
				c.sent++
			default:
				buf = appendFrame(buf, kindClose, nil)
				c.sent++
			}
		}
		if len(buf) > 0 {
			return buf, false
		}
		c.changed.Wait()
	}
}

// read takes what comes over a carrier until that breaks.
func (c *Conn) read(carrier net.Conn, in *bufio.Reader) {
	buf := make([]byte, maxData)
	for {
		kind, data, ack, err := readFrame(in, buf)
		if err == nil {
			err = c.handle(carrier, kind, data, ack)
		}
		if err != nil {
			c.broke(carrier)
			return
		}
	}
}

// handle acts on a frame.
func (c *Conn) handle(carrier net.Conn, kind byte, data []byte, ack int64) error {
	c.mu.Lock()
	if c.carrier != carrier {
		c.mu.Unlock()
		return errEnded
	}
	switch kind {
	case kindAck:
		if ack > c.sent {
			c.mu.Unlock()
			return fmt.Errorf("%d was taken of %d", ack, c.sent)
		}
		if ack > c.acked {
			c.take(ack)
		}
	case kindData:
		if c.eof || c.in.size()+len(data) > 2*window {
			c.mu.Unlock()
			return fmt.Errorf("%d bytes more than were asked for", len(data))
		}
		c.received += int64(len(data))
		if !c.closed {
			c.in.add(data)
		}
	case kindFinish, kindClose:
		if c.eof != (kind == kindClose) || c.gone {
			c.mu.Unlock()
			return fmt.Errorf("a second end of data")
		}
		c.received++
		c.eof, c.gone = true, kind == kindClose
	}
	c.settle()
	return nil
}
