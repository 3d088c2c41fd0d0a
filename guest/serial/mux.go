package serial

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"
)

const (
	// maxStreams bounds the connections at one time. The guest admits twice as
	// many, for those that the host has forgotten a moment earlier.
	maxStreams = 512
	// batch is how many bytes are gathered for one write to the port.
	batch = 64 << 10
)

// mux is the connections of one epoch. The owner of the port reads and calls
// handle. One goroutine at a time sends, for as long as there is something: a
// machine that is frozen while nothing travels has none that waits.
type mux struct {
	send func(*mux, []byte) error // writes to the port, unless the epoch is over

	mu      sync.Mutex
	still   *sync.Cond // sending became false
	sending bool       // a goroutine is in flush
	streams map[uint32]*Conn
	ready   []*Conn // have something to send; each once
	control []byte  // frames that belong to no connection here: at most maxControl
	over    bool    // the epoch ended
	cause   error   // why, for those who still use it; nil: io.EOF
}

// maxControl bounds the control frames that wait: refusals of one small frame
// for each stream that the host can have.
const maxControl = 2 * maxStreams * (headerSize + maxReason)

var errFlood = errors.New("the other end does not keep to its limits")

func newMux(send func(*mux, []byte) error) *mux {
	m := &mux{send: send, streams: map[uint32]*Conn{}}
	m.still = sync.NewCond(&m.mu)
	return m
}

// add makes a connection; m.mu is held.
func (m *mux) add(id uint32, port int) *Conn {
	c := &Conn{m: m, id: id, port: port, credit: window, changed: sync.NewCond(&m.mu)}
	m.streams[id] = c
	return c
}

// forget removes a connection from the table; m.mu is held.
func (m *mux) forget(c *Conn) {
	if m.streams[c.id] == c {
		delete(m.streams, c.id)
	}
	c.out = nil
}

// enqueue has c's frames sent; m.mu is held.
func (m *mux) enqueue(c *Conn) {
	if c.queued || c.gone || m.over {
		return
	}
	c.queued = true
	m.ready = append(m.ready, c)
	m.wake()
}

// wake has somebody send; m.mu is held.
func (m *mux) wake() {
	if !m.sending && !m.over {
		m.sending = true
		go m.flush()
	}
}

// say sends a frame of no connection; m.mu is held.
func (m *mux) say(frame []byte) error {
	if len(m.control)+len(frame) > maxControl {
		return errFlood
	}
	m.control = append(m.control, frame...)
	m.wake()
	return nil
}

// end ends the epoch: every connection fails with cause, or ends if that is nil.
func (m *mux) end(cause error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return
	}
	m.over, m.cause = true, cause
	for _, c := range m.streams {
		c.gone, c.fault, c.out = true, cause, nil
		c.changed.Broadcast()
	}
	clear(m.streams)
	m.ready, m.control = nil, nil
}

func (m *mux) ended() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.over
}

// awaitStill returns when nothing is being written any more, after the end.
func (m *mux) awaitStill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.sending {
		m.still.Wait()
	}
}

// flush sends all that there is to send.
func (m *mux) flush() {
	var buf []byte
	for {
		if buf = m.gather(buf[:0]); len(buf) == 0 {
			return
		}
		if err := m.send(m, buf); err != nil {
			m.end(err)
		}
	}
}

// gather appends up to about batch bytes of what is to be sent, every connection in
// its turn. When it appends nothing, nobody is sending any more.
func (m *mux) gather(buf []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	buf = append(buf, m.control...)
	m.control = m.control[:0]
	for len(m.ready) > 0 && len(buf) < batch {
		c := m.ready[0]
		m.ready = m.ready[1:]
		c.queued = false
		buf = c.emit(buf)
	}
	if len(buf) == 0 {
		m.sending = false
		m.still.Broadcast()
	}
	return buf
}

// emit appends one turn of c's frames; m.mu is held.
func (c *Conn) emit(buf []byte) []byte {
	if c.gone {
		return buf
	}
	if c.owed >= window/2 && !c.eof && !c.closed {
		buf = appendCredit(buf, c.id, c.owed)
		c.owed = 0
	}
	if n := cut(c.out[:min(len(c.out), c.credit)]); n > 0 {
		buf = appendFrame(buf, kindData, c.id, c.out[:n])
		c.out = c.out[n:]
		c.credit -= n
		c.changed.Broadcast()
	}
	switch {
	case len(c.out) > 0:
		if c.credit > 0 {
			c.m.enqueue(c)
		}
		return buf
	case c.closed:
		c.gone = true
		c.m.forget(c)
		return appendFrame(buf, kindClose, c.id, nil)
	case c.finish && !c.finished:
		c.finished = true
		buf = appendFrame(buf, kindFinish, c.id, nil)
	}
	c.out = nil // idle connections hold no memory
	return buf
}

// handle acts on a frame about an existing connection. An error means that the
// other end breaks the protocol.
func (m *mux) handle(f frame) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.streams[f.stream]
	if c == nil {
		return nil // forgotten here, and the other end did not know yet
	}
	switch f.kind {
	case kindData:
		if len(c.in)+c.owed+len(f.payload) > window || c.eof {
			return fmt.Errorf("stream %d: %w", f.stream, errFlood)
		}
		if c.closed {
			c.owed += len(f.payload)
			return nil
		}
		c.in = append(c.in, f.payload...)
	case kindCredit:
		n := int64(c.credit) + int64(binary.BigEndian.Uint32(f.payload))
		if n > window {
			return fmt.Errorf("stream %d: %w", f.stream, errFlood)
		}
		c.credit = int(n)
		if len(c.out) > 0 {
			m.enqueue(c)
		}
	case kindOpened:
		c.opened = true
	case kindRefused:
		c.fault = fmt.Errorf("%w: %s", syscall.ECONNREFUSED, ascii(f.payload))
		c.gone = true
		m.forget(c)
	case kindFinish:
		c.eof = true
	case kindClose:
		c.eof, c.gone = true, true
		m.forget(c)
	}
	c.changed.Broadcast()
	return nil
}

// ascii replaces what a reason should not hold.
func ascii(reason []byte) string {
	text := make([]byte, 0, len(reason))
	for _, b := range reason {
		if b < ' ' || b > '~' {
			b = '?'
		}
		text = append(text, b)
	}
	return string(text)
}
