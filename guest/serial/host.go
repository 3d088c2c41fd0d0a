package serial

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/atoll-run/atoll/sandbox"
)

// Session is the host's end of a port. It may be used from many goroutines.
type Session struct {
	mux  *mux
	conn io.ReadWriteCloser
	last uint32 // the last stream; guarded by mux.mu
	done chan struct{}
}

// Open begins a new epoch on the port and returns when the guest has answered:
// that it did is a sign of life, like a ping. Connections of earlier epochs end
// inside. There may be one session on a port at a time. It owns conn from then
// on, and closes it when Open fails too.
func Open(ctx context.Context, conn io.ReadWriteCloser) (*Session, error) {
	var seed [epochSize]byte
	_, _ = rand.Read(seed[:]) // never fails since Go 1.24
	epoch := binary.BigEndian.Uint64(seed[:])
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	s := &Session{mux: newMux(), conn: conn, done: make(chan struct{})}
	in := &decoder{}
	wrote := make(chan error, 1)
	go func() { // the guest may have to be read before it reads
		_, err := conn.Write(appendHello(nil, epoch))
		wrote <- err
	}()
	err := errors.Join(awaitHello(conn, in, epoch), <-wrote)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		kind := sandbox.KindOf(err)
		if kind == sandbox.Internal {
			kind = sandbox.Unavailable
		}
		return nil, sandbox.E("serial.Open", kind, "", fmt.Errorf("the guest does not answer on its port: %w", err))
	}
	var ends sync.WaitGroup
	ends.Go(func() { s.read(in) })
	ends.Go(func() {
		_ = s.mux.write(conn)
		conn.Close() // ends read
	})
	go func() {
		ends.Wait()
		close(s.done)
	}()
	return s, nil
}

// awaitHello reads until the guest has taken up the epoch. What comes before
// belongs to earlier ones.
func awaitHello(conn io.Reader, in *decoder, epoch uint64) error {
	buf := make([]byte, batch)
	for {
		f, ok, err := in.next()
		switch {
		case err != nil: // not synced; the next mark helps
			continue
		case ok && f.kind == kindHello && binary.BigEndian.Uint64(f.payload) == epoch:
			return nil
		case ok:
			continue
		}
		n, err := conn.Read(buf)
		in.feed(buf[:n])
		if n == 0 && err != nil {
			return err
		}
	}
}

// read takes what the guest sends until the port fails.
func (s *Session) read(in *decoder) {
	defer s.conn.Close() // ends a write that the guest does not take
	buf := make([]byte, batch)
	for {
		f, ok, err := in.next()
		switch {
		case err != nil:
		case ok && (f.kind == kindHello || f.kind == kindOpen):
			err = errors.New("the guest began anew")
		case ok:
			err = s.mux.handle(f)
		default:
			var n int
			n, err = s.conn.Read(buf)
			in.feed(buf[:n])
			if n > 0 {
				err = nil
			}
		}
		if err != nil {
			s.mux.end(fmt.Errorf("connection to the guest lost: %w", err))
			return
		}
	}
}

// Dial opens a connection to a port on the machine's loopback. sandbox.GuestPort
// is the guest agent, MachinePort the agent's calls for the runtime alone. The
// error is Unavailable when nothing listens there or the session has ended, and
// Exhausted when there are too many connections.
func (s *Session) Dial(ctx context.Context, port int) (net.Conn, error) {
	const op = "serial.Dial"
	if port < 0 || port > 65535 {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "port %d", port)
	}
	m := s.mux
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return nil, sandbox.E(op, sandbox.Unavailable, "", m.cause)
	}
	if len(m.streams) >= maxStreams {
		return nil, sandbox.Errorf(op, sandbox.Exhausted, "", "%d connections are open", maxStreams)
	}
	for {
		if s.last = s.last%maxStream + 1; m.streams[s.last] == nil {
			break
		}
	}
	if err := m.say(appendFrame(nil, kindOpen, s.last, binary.BigEndian.AppendUint16(nil, uint16(port)))); err != nil {
		return nil, sandbox.E(op, sandbox.Exhausted, "", err)
	}
	c := m.add(s.last, port)
	stop := context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		c.changed.Broadcast()
	})
	defer stop()
	for {
		switch {
		case c.opened:
			return c, nil
		case c.fault != nil || c.gone:
			return nil, sandbox.E(op, sandbox.Unavailable, "", c.fault)
		case ctx.Err() != nil:
			c.closed = true
			m.enqueue(c)
			return nil, sandbox.E(op, sandbox.KindOf(ctx.Err()), "", ctx.Err())
		}
		c.changed.Wait()
	}
}

// Done is closed when the session has ended: the port failed, the machine is
// gone, or Close was called. Nothing is written to the port from then on.
func (s *Session) Done() <-chan struct{} { return s.done }

// Close ends the session with all its connections, and closes the port.
func (s *Session) Close() error {
	s.mux.end(net.ErrClosed)
	err := s.conn.Close()
	<-s.done
	return err
}
