package server

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"

	"github.com/atoll-run/atoll/guest/serial"
	"github.com/atoll-run/atoll/sandbox"
)

// ServeSerial answers on the one port that leads out of a machine, until reading
// it fails: the protocol, the calls of the machine's maker, and connections to
// any port on loopback. rest is called when the machine is about to be frozen; nil does
// nothing.
func (s *Server) ServeSerial(port io.ReadWriter, rest func()) error {
	s.own.keep = true   // not read yet
	_, _ = maxThreads() // a clone need not ask
	agent, maker := newQueue(), newQueue()
	defer agent.Close()
	defer maker.Close()
	go func() { _ = s.Serve(agent) }()
	calls := http.Server{
		Handler:           s.machineHandler(),
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	go func() { _ = calls.Serve(maker) }()
	return serial.NewGuest(port, func(port int) (func(net.Conn), error) {
		switch port {
		case sandbox.GuestPort:
			return agent.put, nil
		case serial.MachinePort:
			return maker.put, nil
		}
		return dialPort(port)
	}, func(question []byte) []byte { return s.becomeMachine(question, rest) }).Serve()
}

// dialPort connects to a port on loopback and returns what joins a connection with that.
func dialPort(port int) (func(net.Conn), error) {
	target, err := dialLoopback(strconv.Itoa(port))
	if err != nil {
		return nil, err
	}
	return func(c net.Conn) { splice(c, target) }, nil
}

// splice joins two connections until both directions have ended or one failed.
func splice(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	var both sync.WaitGroup
	pass := func(to, from net.Conn) {
		if _, err := io.Copy(to, from); err != nil {
			from.Close() // wakes the other direction
			to.Close()
			return
		}
		closeWrite(to)
	}
	both.Go(func() { pass(a, b) })
	both.Go(func() { pass(b, a) })
	both.Wait()
}

// queue is a listener of connections that are put into it.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), done: make(chan struct{})} }

func (q *queue) put(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return &net.UnixAddr{Net: "serial", Name: "port"} }
