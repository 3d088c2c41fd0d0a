package serial

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/atoll-run/atoll/sandbox"
)

// Session is the host's end of a port. It may be used from many goroutines.
type Session struct {
	mux  *mux
	conn io.ReadWriteCloser
	last uint32 // the last stream; guarded by mux.mu
	done chan struct{}

	asking  chan struct{} // holds something while a question has no answer
	answers chan []byte   // capacity 1: the answer to that
}

// Open begins a new epoch on the port and returns when the guest has answered:
// that it did is a sign of life, like a ping. Connections of earlier epochs end
// inside. There may be one session on a port at a time. It owns conn from then
// on, and closes it when Open fails too.
func Open(ctx context.Context, conn io.ReadWriteCloser) (*Session, error) {
	s, _, err := open(ctx, conn, nil)
	return s, err
}

// OpenAsking is Open and Ask in one message.
func OpenAsking(ctx context.Context, conn io.ReadWriteCloser, question []byte) (*Session, []byte, error) {
	if err := askable("serial.Open", question); err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return open(ctx, conn, appendFrame(nil, kindAsk, 0, question))
}

// askable says why something cannot be a question.
func askable(op string, question []byte) error {
	if len(question) > maxAsk || bytes.Contains(question, mark) {
		return sandbox.Errorf(op, sandbox.Invalid, "", "a question of %d bytes: at most %d, and not the mark of an epoch", len(question), maxAsk)
	}
	return nil
}

// open begins an epoch with a hello and the frame behind it, a question, if there is one.
func open(ctx context.Context, conn io.ReadWriteCloser, ask []byte) (*Session, []byte, error) {
	var seed [epochSize]byte
	_, _ = rand.Read(seed[:]) // never fails since Go 1.24
	epoch := binary.BigEndian.Uint64(seed[:])
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	s := &Session{conn: conn, done: make(chan struct{}), asking: make(chan struct{}, 1), answers: make(chan []byte, 1)}
	s.mux = newMux(func(_ *mux, frames []byte) error {
		_, err := conn.Write(frames)
		if err != nil {
			conn.Close() // ends read
		}
		return err
	})
	in := &decoder{}
	wrote := make(chan error, 1)
	go func() { // the guest may have to be read before it reads
		_, err := conn.Write(append(appendHello(nil, epoch), ask...))
		wrote <- err
	}()
	answer, err := awaitHello(conn, in, epoch, ask != nil)
	err = errors.Join(err, <-wrote)
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
		return nil, nil, sandbox.E("serial.Open", kind, "", fmt.Errorf("the guest does not answer on its port: %w", err))
	}
	go func() {
		s.read(in)
		s.mux.awaitStill()
		close(s.done)
	}()
	return s, answer, nil
}

// awaitHello reads until the guest has taken up the epoch and, if it was asked
// something, has answered. What comes before belongs to earlier epochs.
func awaitHello(conn io.Reader, in *decoder, epoch uint64, asked bool) (answer []byte, err error) {
	buf := make([]byte, batch)
	began := false
	for {
		f, ok, err := in.next()
		switch {
		case err != nil: // not synced; the next mark helps
			began = false
			continue
		case ok && f.kind == kindHello:
			if began = binary.BigEndian.Uint64(f.payload) == epoch; began && !asked {
				return nil, nil
			}
			continue
		case ok && began && f.kind == kindAnswer:
			return bytes.Clone(f.payload), nil
		case ok:
			continue
		}
		n, err := conn.Read(buf)
		in.feed(buf[:n])
		if n == 0 && err != nil {
			return nil, err
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
		case ok && f.kind == kindAnswer:
			select {
			case s.answers <- bytes.Clone(f.payload):
			default:
				err = errFlood
			}
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

// Ask has the guest answer a question, at most 8 KiB, which it does before anything
// else. One question is under way at a time; others wait. A question whose asker
// gave up ends the session: nobody could tell its answer from the next one's.
func (s *Session) Ask(ctx context.Context, question []byte) ([]byte, error) {
	const op = "serial.Ask"
	if err := askable(op, question); err != nil {
		return nil, err
	}
	select {
	case s.asking <- struct{}{}:
	case <-ctx.Done():
		return nil, sandbox.E(op, sandbox.KindOf(ctx.Err()), "", ctx.Err())
	}
	defer func() { <-s.asking }()
	m := s.mux
	m.mu.Lock()
	err := m.cause
	if !m.over {
		err = m.say(appendFrame(nil, kindAsk, 0, question))
	}
	m.mu.Unlock()
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unavailable, "", err)
	}
	select {
	case answer := <-s.answers:
		return answer, nil
	case <-s.done:
		return nil, sandbox.E(op, sandbox.Unavailable, "", m.cause)
	case <-ctx.Done():
		m.end(ctx.Err())
		s.conn.Close()
		return nil, sandbox.E(op, sandbox.KindOf(ctx.Err()), "", ctx.Err())
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
