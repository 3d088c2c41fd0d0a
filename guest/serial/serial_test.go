package serial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// line returns both ends of a serial line.
func line(t *testing.T) (host, machine net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "line")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	t.Cleanup(func() { ends[0].Close(); ends[1].Close() })
	return ends[0], ends[1]
}

const (
	echoPort   = 1
	wastePort  = 2 // reads everything, then says how much it was
	deafPort   = 3 // never reads
	closedPort = 4
)

// services is a guest's dial.
func services(port int) (func(net.Conn), error) {
	switch port {
	case echoPort:
		return func(c net.Conn) { defer c.Close(); io.Copy(c, c) }, nil
	case wastePort:
		return func(c net.Conn) {
			defer c.Close()
			n, _ := io.Copy(io.Discard, c)
			fmt.Fprintf(c, "%d bytes", n)
		}, nil
	case deafPort:
		return func(net.Conn) {}, nil
	}
	return nil, errors.New("nothing there")
}

// backwards is a guest's answer: the question from its end to its beginning.
func backwards(question []byte) []byte {
	answer := bytes.Clone(question)
	slices.Reverse(answer)
	return answer
}

func openLine(t *testing.T, host net.Conn) *Session {
	t.Helper()
	s, err := Open(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func dial(t *testing.T, s *Session, port int) net.Conn {
	t.Helper()
	c, err := s.Dial(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// noise returns bytes full of marks and parts of marks.
func noise(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	var b []byte
	for len(b) < n {
		switch r.IntN(3) {
		case 0:
			b = append(b, mark...)
		case 1:
			b = append(b, mark[:r.IntN(len(mark))]...)
		default:
			for range r.IntN(40000) {
				b = append(b, byte(r.Uint32()))
			}
		}
	}
	return b[:n]
}

func TestManyConnectionsShareOneLine(t *testing.T) {
	host, machine := line(t)
	go NewGuest(machine, services, backwards).Serve()
	s := openLine(t, host)
	defer s.Close()
	stuck := dial(t, s, deafPort) // must not hold up the others
	go stuck.Write(make([]byte, 4*window))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c := dial(t, s, echoPort)
			defer c.Close()
			want := noise(300_000+i*1000, uint64(i))
			go func() { c.Write(want); c.(*Conn).CloseWrite() }()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("connection %d: %d of %d bytes came back, equal %v, %v", i, len(got), len(want), bytes.Equal(got, want), err)
			}
		})
	}
	wg.Wait()
	c := dial(t, s, wastePort)
	c.Write(make([]byte, 1<<20))
	c.(*Conn).CloseWrite()
	if got, _ := io.ReadAll(c); string(got) != "1048576 bytes" {
		t.Errorf("after a half-close the guest says %q", got)
	}
	if _, err := s.Dial(t.Context(), closedPort); !sandbox.Is(err, sandbox.Unavailable) {
		t.Errorf("Dial where nothing listens: %v", err)
	}
}

func TestAnEpochBeginsInTheMiddleOfAnything(t *testing.T) {
	host, machine := line(t)
	go NewGuest(machine, services, backwards).Serve()
	for i := range 10 {
		// A host that went in the middle of a frame leaves its beginning behind.
		var torn []byte
		torn = appendFrame(torn, kindData, 5, noise(maxPayload, uint64(i))[:cut(noise(maxPayload, uint64(i)))])
		if _, err := host.Write(torn[:len(torn)-i]); err != nil {
			t.Fatal(err)
		}
		// A duplicate keeps the line when the session closes its end.
		f, err := host.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		end, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		s := openLine(t, end)
		c := dial(t, s, echoPort)
		go c.Write(make([]byte, 3*window)) // its echo is not read: much is under way
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		// Not Close, which could not be a snapshot: the session just ends here.
		s.mux.end(net.ErrClosed)
		end.SetReadDeadline(time.Now())
		<-s.Done()
	}
}

func TestQuestionsAreAnsweredBesideConnections(t *testing.T) {
	host, machine := line(t)
	go NewGuest(machine, services, backwards).Serve()
	s, answer, err := OpenAsking(t.Context(), host, []byte("first"))
	if err != nil || string(answer) != "tsrif" {
		t.Fatalf("a question with the hello: %q, %v", answer, err)
	}
	defer s.Close()
	c := dial(t, s, echoPort)
	go c.Write(make([]byte, 3*window)) // its echo is not read: much is under way
	var askers sync.WaitGroup
	for i := range 20 {
		askers.Go(func() {
			question := fmt.Appendf(nil, "%d%s", i, bytes.Repeat([]byte{0xff}, i*400))
			got, err := s.Ask(t.Context(), question)
			if err != nil || !bytes.Equal(got, backwards(question)) {
				t.Errorf("question %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	askers.Wait()
	for _, question := range [][]byte{make([]byte, maxAsk+1), mark} {
		if _, err := s.Ask(t.Context(), question); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("a question of %d bytes: %v", len(question), err)
		}
	}
	machine.Close()
	if _, err := s.Ask(t.Context(), nil); !sandbox.Is(err, sandbox.Unavailable) {
		t.Errorf("a question to a machine that is gone: %v", err)
	}
}

func TestAnUnansweredQuestionEndsTheSession(t *testing.T) {
	host, machine := line(t)
	entered, leave := make(chan bool), make(chan bool)
	defer close(leave)
	go NewGuest(machine, services, func([]byte) []byte { entered <- true; <-leave; return nil }).Serve()
	s := openLine(t, host)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := s.Ask(ctx, nil); !sandbox.Is(err, sandbox.Canceled) {
		t.Errorf("a question that is given up: %v", err)
	}
	<-s.Done()
}

func TestDeadlinesAndClosing(t *testing.T) {
	host, machine := line(t)
	go NewGuest(machine, services, backwards).Serve()
	s := openLine(t, host)
	c := dial(t, s, deafPort)
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read past its deadline: %v", err)
	}
	c.SetWriteDeadline(time.Now().Add(time.Millisecond))
	if _, err := c.Write(make([]byte, 2*window)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write past its deadline: %v", err)
	}
	c.Close()
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write after Close: %v", err)
	}
	other := dial(t, s, echoPort)
	machine.Close()
	if _, err := other.Read(make([]byte, 1)); err == nil {
		t.Error("Read succeeds though the machine is gone")
	}
	<-s.Done()
	if _, err := s.Dial(t.Context(), echoPort); !sandbox.Is(err, sandbox.Unavailable) {
		t.Errorf("Dial to a machine that is gone: %v", err)
	}
}

func TestASilentGuestIsGivenUp(t *testing.T) {
	host, _ := line(t)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Millisecond, cancel)
	if _, err := Open(ctx, host); !sandbox.Is(err, sandbox.Canceled) {
		t.Errorf("Open of a silent port: %v", err)
	}
}

// FuzzGuestSpeaks has a hostile guest say anything to a host.
func FuzzGuestSpeaks(f *testing.F) {
	f.Add(appendFrame(nil, kindData, 1, []byte("hello")))
	f.Add(appendCredit(appendFrame(nil, kindOpened, 1, nil), 1, window))
	f.Add(appendFrame(nil, kindAnswer, 0, []byte("yes")))
	f.Add(appendHello(appendFrame(nil, kindRefused, 1, []byte("no")), 7))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newMux(func(*mux, []byte) error { return nil })
		m.mu.Lock()
		m.add(1, echoPort)
		m.mu.Unlock()
		d := &decoder{synced: true}
		for len(data) > 0 {
			n := min(len(data), 1000)
			d.feed(data[:n])
			data = data[n:]
			for {
				f, ok, err := d.next()
				if err != nil || !ok {
					break
				}
				if m.handle(f) != nil {
					return
				}
			}
			if len(d.buf) > maxPayload+headerSize+1000 {
				t.Fatalf("%d bytes are kept", len(d.buf))
			}
			m.mu.Lock()
			if c := m.streams[1]; c != nil && len(c.in) > window {
				t.Fatalf("%d bytes are queued", len(c.in))
			}
			m.mu.Unlock()
		}
	})
}

// FuzzPayloads sends anything through frames, cut anywhere.
func FuzzPayloads(f *testing.F) {
	f.Add(noise(100, 3), uint16(7))
	f.Add(append(bytes.Repeat(mark, 3), mark[:5]...), uint16(1))
	f.Fuzz(func(t *testing.T, data []byte, step uint16) {
		stream := appendHello([]byte("rubbish"), 1)
		for rest := data; len(rest) > 0; {
			n := cut(rest)
			stream = appendFrame(stream, kindData, 9, rest[:n])
			rest = rest[n:]
		}
		if bytes.Count(stream, mark) != 1 {
			t.Fatal("the mark occurs where it is not meant")
		}
		var got []byte
		d := &decoder{}
		for len(stream) > 0 {
			n := min(len(stream), int(step)+1)
			d.feed(stream[:n])
			stream = stream[n:]
			for {
				f, ok, err := d.next()
				if err != nil {
					t.Fatal(err)
				}
				if !ok {
					break
				}
				if f.kind == kindData {
					got = append(got, f.payload...)
				}
			}
		}
		if !bytes.Equal(got, data) {
			t.Fatalf("%d bytes became %d others", len(data), len(got))
		}
	})
}

func BenchmarkThroughput(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	machine := os.NewFile(uintptr(fds[0]), "machine")
	host := os.NewFile(uintptr(fds[1]), "host")
	defer machine.Close()
	go NewGuest(machine, services, backwards).Serve()
	s, err := Open(b.Context(), host)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	c, err := s.Dial(b.Context(), wastePort)
	if err != nil {
		b.Fatal(err)
	}
	block := make([]byte, 32<<10)
	b.SetBytes(int64(len(block)))
	for b.Loop() {
		if _, err := c.Write(block); err != nil {
			b.Fatal(err)
		}
	}
}
