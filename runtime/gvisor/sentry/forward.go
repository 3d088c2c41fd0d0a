package sentry

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/fdnotifier"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxForwards bounds the connections into one sandbox.
	maxForwards = 1024
	// forwardBuffer is the size of one copy, in bytes.
	forwardBuffer = 64 << 10
	// connectTimeout bounds the wait for a port that neither takes nor refuses a connection.
	connectTimeout = 5 * time.Second
)

// forwardSource is the address from which all forwards come. No program inside
// uses it by itself, so that those of a snapshot can be told apart later.
var forwardSource = tcpip.AddrFrom4([4]byte{127, 64, 0, 1})

// forwards is the connections from outside into the sandbox. It lives in the sentry.
type forwards struct {
	stack *stack.Stack

	// gate is held for reading by everything that touches an endpoint, and for
	// writing while the sandbox is saved.
	gate sync.RWMutex

	mu    sync.Mutex
	pause chan struct{} // closed to make all waits end, so that gate comes free
	open  int
}

func (f *forwards) init(s *stack.Stack) {
	f.stack = s
	f.pause = make(chan struct{})
	for _, ep := range s.RegisteredEndpoints() {
		if ep, ok := ep.(*tcp.Endpoint); ok {
			if addr, err := ep.GetLocalAddress(); err == nil && addr.Addr == forwardSource {
				ep.Abort()
			}
		}
	}
}

// suspend makes all connections stand still until resume is called.
func (f *forwards) suspend() (resume func()) {
	f.mu.Lock()
	close(f.pause)
	f.mu.Unlock()
	f.gate.Lock()
	return func() {
		f.mu.Lock()
		f.pause = make(chan struct{})
		f.mu.Unlock()
		f.gate.Unlock()
	}
}

// paused returns the channel whose end means that the gate is wanted.
func (f *forwards) paused() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pause
}

// forward is one connection: a host socket and an endpoint of the sandbox's stack.
type forward struct {
	f      *forwards
	socket int
	events waiter.Queue // of the socket
	ep     tcpip.Endpoint
	wq     waiter.Queue  // of the endpoint
	ended  chan struct{} // closed when one direction failed, so that the other ends too
	once   sync.Once
}

// connect dials the port and copies in both directions from then on. It takes
// no ownership of file.
func (f *forwards) connect(file *os.File, port uint16) error {
	f.mu.Lock()
	full := f.open >= maxForwards
	if !full {
		f.open++
	}
	f.mu.Unlock()
	if full {
		return fmt.Errorf("%d connections into the sandbox are open already", maxForwards)
	}
	c := &forward{f: f, ended: make(chan struct{})}
	f.gate.RLock()
	defer f.gate.RUnlock()
	err := c.dial(port)
	if err == nil {
		if c.socket, err = unix.Dup(int(file.Fd())); err == nil {
			err = fdnotifier.AddFD(int32(c.socket), &c.events)
		}
	}
	if err != nil {
		c.close()
		return err
	}
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); c.run(c.inward) }()
	go func() { defer wg.Done(); c.run(c.outward) }()
	go func() { wg.Wait(); f.gate.RLock(); defer f.gate.RUnlock(); c.close() }()
	return nil
}

// run makes one direction and ends both when it fails.
func (c *forward) run(direction func() error) {
	c.f.gate.RLock()
	defer c.f.gate.RUnlock()
	if direction() != nil {
		c.once.Do(func() { close(c.ended) })
	}
}

// close gives back what the forward holds. The caller holds the gate.
func (c *forward) close() {
	if c.ep != nil {
		c.ep.Close()
	}
	if c.socket > 0 {
		fdnotifier.RemoveFD(int32(c.socket))
		_ = unix.Close(c.socket)
	}
	c.f.mu.Lock()
	c.f.open--
	c.f.mu.Unlock()
}

// dial connects to the port on 127.0.0.1, or on ::1 when nothing listens there.
func (c *forward) dial(port uint16) error {
	err := c.dialOn(ipv4.ProtocolNumber, forwardSource, tcpip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	if _, refused := err.(*tcpip.ErrConnectionRefused); refused {
		err6 := c.dialOn(ipv6.ProtocolNumber, tcpip.Address{}, tcpip.AddrFrom16([16]byte{15: 1}), port)
		if err6 == nil {
			return nil
		}
	}
	if err != nil {
		return errors.New(err.String())
	}
	return nil
}

func (c *forward) dialOn(net tcpip.NetworkProtocolNumber, from, to tcpip.Address, port uint16) tcpip.Error {
	ep, err := c.f.stack.NewEndpoint(tcp.ProtocolNumber, net, &c.wq)
	if err != nil {
		return err
	}
	if from.Len() > 0 {
		if err := ep.Bind(tcpip.FullAddress{Addr: from}); err != nil {
			ep.Close()
			return err
		}
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	c.wq.EventRegister(&entry)
	defer c.wq.EventUnregister(&entry)
	err = ep.Connect(tcpip.FullAddress{Addr: to, Port: port})
	if _, started := err.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ready:
			err = ep.LastError()
		case <-time.After(connectTimeout):
			err = &tcpip.ErrTimeout{}
		case <-c.f.paused():
			err = &tcpip.ErrAborted{} // the sandbox is being saved; the caller may try again
		}
	}
	if err != nil {
		ep.Abort()
		return err
	}
	c.ep = ep
	return nil
}

// errEnded ends a direction because the other one failed.
var errEnded = errors.New("connection ended")

// await waits for an event of q. It lets the gate go when the sandbox is to be
// saved and returns when it is through. register and unregister tell q's owner.
func (c *forward) await(q *waiter.Queue, mask waiter.EventMask, again func() bool) error {
	entry, ready := waiter.NewChannelEntry(mask | waiter.EventHUp | waiter.EventErr)
	q.EventRegister(&entry)
	if q == &c.events {
		_ = fdnotifier.UpdateFD(int32(c.socket))
	}
	leave := func() {
		q.EventUnregister(&entry)
		if q == &c.events {
			_ = fdnotifier.UpdateFD(int32(c.socket))
		}
	}
	if again() { // it became ready before we registered
		leave()
		return nil
	}
	var err error
	paused := c.f.paused()
	select {
	case <-ready:
	case <-paused:
	case <-c.ended:
		err = errEnded
	}
	leave()
	c.f.gate.RUnlock()
	c.f.gate.RLock()
	return err
}

// inward copies from the host's socket to the sandbox, and passes on its end.
func (c *forward) inward() error {
	buf := make([]byte, forwardBuffer)
	for {
		n, err := unix.Read(c.socket, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := c.await(&c.events, waiter.ReadableEvents, c.pollSocket(unix.POLLIN)); err != nil {
				return err
			}
		case err != nil:
			return err
		case n == 0:
			if err := c.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
				return errors.New(err.String())
			}
			return nil
		default:
			if err := c.send(buf[:n]); err != nil {
				return err
			}
		}
	}
}

// send writes all of data to the endpoint.
func (c *forward) send(data []byte) error {
	r := bytes.NewReader(data)
	for r.Len() > 0 {
		// Atomic: only what fits is taken from r.
		_, err := c.ep.Write(r, tcpip.WriteOptions{Atomic: true})
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			ready := func() bool { return c.ep.Readiness(waiter.WritableEvents) != 0 }
			if err := c.await(&c.wq, waiter.WritableEvents, ready); err != nil {
				return err
			}
		default:
			return errors.New(err.String())
		}
	}
	return nil
}

// outward copies from the sandbox to the host's socket, and passes on its end.
func (c *forward) outward() error {
	buf := make([]byte, forwardBuffer)
	for {
		w := tcpip.SliceWriter(buf)
		res, err := c.ep.Read(&w, tcpip.ReadOptions{})
		switch err.(type) {
		case nil:
			if err := c.deliver(buf[:res.Count]); err != nil {
				return err
			}
		case *tcpip.ErrWouldBlock:
			ready := func() bool { return c.ep.Readiness(waiter.ReadableEvents) != 0 }
			if err := c.await(&c.wq, waiter.ReadableEvents, ready); err != nil {
				return err
			}
		case *tcpip.ErrClosedForReceive:
			return unix.Shutdown(c.socket, unix.SHUT_WR)
		default:
			return errors.New(err.String())
		}
	}
}

// deliver writes all of data to the host's socket.
func (c *forward) deliver(data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(c.socket, data)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := c.await(&c.events, waiter.WritableEvents, c.pollSocket(unix.POLLOUT)); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			data = data[n:]
		}
	}
	return nil
}

// pollSocket asks whether the socket is ready.
func (c *forward) pollSocket(events int16) func() bool {
	return func() bool {
		mask := waiter.EventMask(events) | waiter.EventHUp | waiter.EventErr
		return fdnotifier.NonBlockingPoll(int32(c.socket), mask) != 0
	}
}
