package lasting

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// place is a guest and the way to it, on which connections are cut.
type place struct {
	Guest
	l    net.Listener
	gone atomic.Bool // nothing gets through

	mu    sync.Mutex
	conns []net.Conn
}

// newPlace makes a guest on whose ports serve answers; the agent on its port is an HTTP server.
func newPlace(t *testing.T, serve func(port int) (func(net.Conn), error)) *place {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &place{l: l}
	p.Allows = func(token string) bool { return token == "secret" }
	p.Serve = serve
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "agent") })}
	go func() { _ = srv.Serve(p.Listen(l)) }()
	t.Cleanup(func() { srv.Close(); p.Drop() })
	return p
}

func (p *place) way(ctx context.Context) (net.Conn, error) {
	if p.gone.Load() {
		return nil, sandbox.Errorf("test", sandbox.Unavailable, "", "it is on its way")
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.l.Addr().String())
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
	return c, nil
}

// cut breaks all carriers.
func (p *place) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.(*net.TCPConn).SetLinger(0) // what is under way is lost
		_ = c.Close()
	}
	p.conns = nil
}

func (p *place) left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Guest.mu.Lock()
	defer p.Guest.mu.Unlock()
	return len(p.streams)
}

func random(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// conformance: V3
func TestEveryByteArrivesOnceHoweverOftenTheWayBreaks(t *testing.T) {
	const size = 8 << 20
	up, down := random(1, size), random(2, size)
	got := make(chan []byte, 1)
	p := newPlace(t, func(int) (func(net.Conn), error) {
		return func(c net.Conn) {
			go func() {
				_, _ = c.Write(down)
				_ = c.(*Conn).CloseWrite()
			}()
			b, _ := io.ReadAll(c)
			got <- b
			_ = c.Close()
		}, nil
	})
	c, err := Dial(t.Context(), p.way, 80, "secret")
	if err != nil {
		t.Fatal(err)
	}
	stop, cuts := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				cuts <- n
				return
			case <-time.After(3 * time.Millisecond):
				p.gone.Store(n%3 == 0)
				p.cut()
				n++
			}
		}
	}()
	go func() {
		for rest := up; len(rest) > 0; {
			n := min(len(rest), 50_000)
			if _, err := c.Write(rest[:n]); err != nil {
				t.Error(err)
				return
			}
			rest = rest[n:]
		}
		_ = c.CloseWrite()
	}()
	b, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(b, down) {
		t.Errorf("%d of %d bytes came, %v", len(b), size, err)
	}
	if b := <-got; !bytes.Equal(b, up) {
		t.Errorf("%d of %d bytes went", len(b), size)
	}
	close(stop)
	n := <-cuts
	p.gone.Store(false)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	<-c.done
	t.Logf("measured: V3 %d bytes each way over a connection whose way broke %d times", size, n)
	waitFor(t, "the guest forgets the connection", func() bool { return p.left() == 0 })
}

// waitFor waits until something that must come has come.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 5000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func TestWhatWasWrittenBeforeClosingArrivesThoughTheWayIsBroken(t *testing.T) {
	data := random(3, 300_000)
	got := make(chan []byte, 1)
	p := newPlace(t, func(int) (func(net.Conn), error) {
		return func(c net.Conn) {
			b, _ := io.ReadAll(c)
			got <- b
			_ = c.Close()
		}, nil
	})
	c, err := Dial(t.Context(), p.way, 80, "secret")
	if err != nil {
		t.Fatal(err)
	}
	p.gone.Store(true)
	p.cut()
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	p.gone.Store(false)
	if b := <-got; !bytes.Equal(b, data) {
		t.Errorf("%d of %d bytes arrived", len(b), len(data))
	}
	<-c.done
	waitFor(t, "the guest forgets the connection", func() bool { return p.left() == 0 })
}

func TestOneThatReadsNoMoreIsToldToTheOther(t *testing.T) {
	wrote := make(chan error, 1)
	p := newPlace(t, func(int) (func(net.Conn), error) {
		return func(c net.Conn) {
			_, err := io.Copy(c, rand.NewChaCha8([32]byte{}))
			wrote <- err
			_ = c.Close()
		}, nil
	})
	c, err := Dial(t.Context(), p.way, 80, "secret")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if err := <-wrote; err == nil {
		t.Error("the server writes for ever")
	}
	waitFor(t, "the guest forgets the connection", func() bool { return p.left() == 0 })
}

func TestTheWayThatIsLostForGoodEndsTheConnection(t *testing.T) {
	p := newPlace(t, func(int) (func(net.Conn), error) {
		return func(c net.Conn) { _, _ = io.Copy(c, c) }, nil
	})
	for name, end := range map[string]func(){
		"the guest began another life": func() { p.Drop() },
		"the sandbox is gone": func() {
			p.gone.Store(true)
			p.cut()
		},
	} {
		p.gone.Store(false)
		way := func(ctx context.Context) (net.Conn, error) {
			if p.gone.Load() {
				return nil, sandbox.Errorf("test", sandbox.NotFound, "", "gone")
			}
			return p.way(ctx)
		}
		c, err := Dial(t.Context(), way, 80, "secret")
		if err != nil {
			t.Fatal(err)
		}
		end()
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: reading gives %v", name, err)
		}
		_ = c.Close()
	}
}

func TestAPortThatNobodyServesAWrongTokenAndAnOldAgentAreTold(t *testing.T) {
	p := newPlace(t, func(int) (func(net.Conn), error) { return nil, errors.New("connection refused") })
	if _, err := Dial(t.Context(), p.way, 81, "secret"); !sandbox.Is(err, sandbox.Unavailable) {
		t.Errorf("a closed port: %v", err)
	}
	if _, err := Dial(t.Context(), p.way, 81, "guess"); !sandbox.Is(err, sandbox.Denied) {
		t.Errorf("a wrong token: %v", err)
	}
	old := &http.Server{ReadHeaderTimeout: time.Minute}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = old.Serve(l) }()
	t.Cleanup(func() { old.Close() })
	_, err = Dial(t.Context(), func(context.Context) (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }, 81, "")
	if !Foreign(err) {
		t.Errorf("an old agent: %v", err)
	}
	resp, err := http.Get("http://" + p.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if string(b) != "agent" {
		t.Errorf("the agent itself answers %q", b)
	}
}

func FuzzCarrier(f *testing.F) {
	f.Add([]byte("d\x00\x00\x02hi"), []byte(magic))
	f.Add(appendAck(appendFrame(nil, kindFinish, nil), 0), greeting{what: askNew, port: 80}.encode())
	f.Fuzz(func(t *testing.T, frames, hello []byte) {
		_, _ = readGreeting(bytes.NewReader(hello))
		_, _ = readAnswer(bytes.NewReader(hello))
		near, far := net.Pipe()
		c := newConn(id{}, 80)
		c.lost = func(c *Conn) { c.fail(errEnded) }
		if err := c.attach(near, newReader(near), 0); err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, far) }()
		_, _ = far.Write(frames)
		_ = far.Close()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	})
}
