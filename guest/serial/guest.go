// Package serial carries many connections over the one serial port that a
// machine and its host share.
//
// The host opens connections by port number, as if to the machine's loopback,
// and the guest accepts or refuses them. Every connection has its own flow
// control, so none holds up another.
//
// A machine that was snapshotted, forked or moved finds another host at its
// port, which may have been left in the middle of anything. Therefore the host
// begins every session with a new epoch: what was under way before is void on
// both sides, and connections of the past end.
package serial

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
)

// MachinePort is no TCP port: it leads to the agent's calls for the runtime
// alone, which no process in the machine and no user of the sandbox can reach.
const MachinePort = 0

// Guest is the machine's end of a port.
type Guest struct {
	port   io.ReadWriter
	dial   func(port int) (func(net.Conn), error)
	answer func(question []byte) []byte

	writing sync.Mutex // held while the port is written
}

// NewGuest returns the machine's end. For each connection it calls dial, from a
// goroutine of its own, which returns what then serves the connection and closes
// it, or an error that the host is told. For each question it calls answer, from
// the goroutine that reads the port, which must not wait for anything; the
// question is valid until it returns.
func NewGuest(port io.ReadWriter, dial func(port int) (func(net.Conn), error), answer func(question []byte) []byte) *Guest {
	return &Guest{port: port, dial: dial, answer: answer}
}

// Serve serves the port until reading it fails.
//
// A hello and questions are answered at once, in a straight line: that is the first
// thing that a clone does, and an emulated one has translated none of its code.
// Writing may wait for the host, which reads whatever it writes itself.
func (g *Guest) Serve() error {
	var (
		in  decoder
		m   *mux // of the present epoch; nil before the first
		buf = make([]byte, batch)
	)
	defer func() {
		if m != nil {
			m.end(net.ErrClosed)
		}
	}()
	for {
		f, ok, err := in.next()
		switch {
		case err != nil: // the next mark helps
			if m != nil {
				m.end(err)
			}
		case ok && f.kind == kindHello:
			if m != nil {
				m.end(errors.New("the host began anew"))
			}
			m = newMux(g.send)
			g.reply(m, appendHello(nil, binary.BigEndian.Uint64(f.payload)))
		case ok && m == nil:
		case ok && f.kind == kindAsk:
			g.reply(m, appendFrame(nil, kindAnswer, 0, g.answered(f.payload)))
		case ok && f.kind == kindOpen:
			g.open(m, f.stream, int(binary.BigEndian.Uint16(f.payload)))
		case ok:
			if err := m.handle(f); err != nil {
				m.end(err)
			}
		default:
			n, err := g.port.Read(buf)
			in.feed(buf[:n])
			if n == 0 && err != nil {
				return err
			}
		}
	}
}

// send writes frames of one epoch. Nothing is written when that is over, though
// the writer before may still be in the middle of a frame.
func (g *Guest) send(m *mux, frames []byte) error {
	g.writing.Lock()
	defer g.writing.Unlock()
	if m.ended() {
		return net.ErrClosed
	}
	_, err := g.port.Write(frames)
	return err
}

// reply writes a frame from the goroutine that reads.
func (g *Guest) reply(m *mux, frame []byte) {
	if err := g.send(m, frame); err != nil {
		m.end(err)
	}
}

// answered is the answer to a question, within bounds.
func (g *Guest) answered(question []byte) []byte {
	answer := g.answer(question)
	answer = answer[:min(len(answer), maxAsk)]
	return answer[:cut(answer)]
}

// open begins a connection that the host asks for.
func (g *Guest) open(m *mux, id uint32, port int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over || m.streams[id] != nil {
		return
	}
	if len(m.streams) >= 2*maxStreams {
		_ = m.say(refusal(id, errors.New("too many connections"))) // a flood is answered by silence
		return
	}
	c := m.add(id, port)
	go func() {
		serve, err := g.dial(port)
		m.mu.Lock()
		switch {
		case c.gone: // the host gave up
		case err != nil:
			c.gone = true
			m.forget(c)
			_ = m.say(refusal(id, err))
		default:
			_ = m.say(appendFrame(nil, kindOpened, id, nil))
		}
		m.mu.Unlock()
		if err == nil {
			serve(c)
		}
	}()
}

func refusal(id uint32, err error) []byte {
	reason := ascii([]byte(err.Error()))
	return appendFrame(nil, kindRefused, id, []byte(reason[:min(len(reason), maxReason)]))
}
