package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage bounds one message of QMP, in bytes. What we ask is answered in a
// few hundred.
const maxMessage = 1 << 20

// event is what QEMU tells by itself.
type event struct {
	Name string
	Data json.RawMessage
	At   time.Time // when it happened, which QEMU may tell later
}

// message is one line from QEMU: a greeting, an answer or an event.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	When     moment          `json:"timestamp"` // of an event
	Data     json.RawMessage `json:"data"`
	ID       uint64          `json:"id"`
}

// qmpError is QEMU's refusal.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// moment is a time of the host's clock; zero when QEMU does not know.
type moment struct {
	Seconds      int64 `json:"seconds"`
	Microseconds int64 `json:"microseconds"`
}

// before returns the moment as one of now's clock, which does not jump; now itself where that cannot be.
func (m moment) before(now time.Time) time.Time {
	ago := now.Sub(time.Unix(m.Seconds, m.Microseconds*1000))
	if m.Seconds <= 0 || ago < 0 || ago > time.Minute {
		return now
	}
	return now.Add(-ago)
}

// parseMessage decodes one line. A message is exactly one of its four kinds.
func parseMessage(line []byte) (m message, err error) {
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("QEMU says what is no JSON: %w", err)
	}
	kinds := 0
	for _, is := range []bool{m.Greeting != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return m, fmt.Errorf("QEMU says what is no message of QMP: %.100q", line)
	}
	return m, nil
}

// client speaks QMP over one connection. Its calls may be made from many
// goroutines.
type client struct {
	conn   *net.UnixConn
	events func(event) // called for each in order; must not block nor call

	writing sync.Mutex // held while a command and its file are sent

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan message // capacity 1
	err     error                   // why the connection ended; nil while it lives
}

// openQMP greets QEMU. It owns conn from then on and closes it when it fails.
func openQMP(ctx context.Context, conn *net.UnixConn, events func(event)) (*client, error) {
	c := &client{conn: conn, events: events, waiting: make(map[uint64]chan message)}
	go c.read()
	// QEMU greets first; the command may be sent before that is read.
	if err := c.call(ctx, "qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet QEMU: %w", err)
	}
	return c, nil
}

// errGone says that QEMU ended or was let go.
var errGone = errors.New("the connection to QEMU has ended")

// read takes what QEMU says until the connection ends.
func (c *client) read() {
	in := bufio.NewReaderSize(c.conn, 4096)
	var err error
	for err == nil {
		var line []byte
		if line, err = readLine(in); err != nil {
			break
		}
		var m message
		if m, err = parseMessage(line); err != nil {
			break
		}
		switch {
		case m.Event != "":
			c.events(event{m.Event, m.Data, m.When.before(time.Now())})
		case m.Greeting == nil:
			c.mu.Lock()
			if ch := c.waiting[m.ID]; ch != nil {
				ch <- m
				delete(c.waiting, m.ID)
			}
			c.mu.Unlock()
		}
	}
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
		err = errGone
	}
	c.mu.Lock()
	c.err = err
	for _, ch := range c.waiting {
		close(ch)
	}
	clear(c.waiting)
	c.mu.Unlock()
	c.conn.Close()
	c.events(event{Name: eventGone})
}

// eventGone is our own: the connection has ended.
const eventGone = "ATOLL_GONE"

// readLine reads up to a newline, at most maxMessage bytes.
func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxMessage {
			return nil, fmt.Errorf("a message of QEMU is longer than %d bytes", maxMessage)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return bytes.TrimSpace(line), err
		}
	}
}

// call makes one call. args is nil or what becomes a JSON object, result nil or
// where the answer goes. fd, if it is given, travels with the command.
func (c *client) call(ctx context.Context, command string, args, result any, fd ...int) error {
	ch := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.last++
	id := c.last
	c.waiting[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return err
	}
	if err := c.send(append(line, '\n'), fd); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m, ok := <-ch:
		switch {
		case !ok:
			return fmt.Errorf("%s: %w", command, errGone)
		case m.Error != nil:
			return fmt.Errorf("%s: %w", command, m.Error)
		case result != nil:
			return json.Unmarshal(m.Return, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
}

// send writes one line, with a file. It is short: QEMU's socket takes it at once
// or QEMU does not read at all, which the caller's context ends by Close.
func (c *client) send(line []byte, fd []int) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	if len(fd) == 0 {
		_, err := c.conn.Write(line)
		return err
	}
	_, _, err := c.conn.WriteMsgUnix(line, unix.UnixRights(fd...), nil)
	return err
}

// close ends the connection.
func (c *client) close() error { return c.conn.Close() }
