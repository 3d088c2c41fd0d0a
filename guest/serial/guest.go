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
	port io.ReadWriter
	dial func(port int) (func(net.Conn), error)

	writing sync.Mutex // held by the writer of the present epoch
}

// NewGuest returns the machine's end. For each connection it calls dial, from a
// goroutine of its own, which returns what then serves the connection and closes
// it, or an error that the host is told.
func NewGuest(port io.ReadWriter, dial func(port int) (func(net.Conn), error)) *Guest {
	return &Guest{port: port, dial: dial}
}

// Serve serves the port until reading it fails.
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
			m = newMux()
			go g.write(m, binary.BigEndian.Uint64(f.payload))
		case ok && m == nil:
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

// write is the writer of one epoch.
func (g *Guest) write(m *mux, epoch uint64) {
	g.writing.Lock() // the writer before may be in the middle of a frame
	defer g.writing.Unlock()
	if m.ended() {
		return
	}
	if _, err := g.port.Write(appendHello(nil, epoch)); err != nil {
		m.end(err)
		return
	}
	_ = m.write(g.port) // an error ended the epoch, which is all there is to do
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
