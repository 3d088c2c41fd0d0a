package lasting

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/atoll-run/atoll/sandbox"
)

// A carrier begins with a greeting of the client and the guest's answer. All numbers are big-endian.
//
//	greeting   magic (8), what (1), stream (16), port (2), number of what was received (8), length of the token (1), token, a line's end twice
//	answer     magic (8), verdict (1), number of what was received (8), length of the reason (2), reason
//
// Then frames travel in both directions: kind (1), length (3), payload. Whatever is sent has a number: each byte of data
// one, the end of data one, and the closing one.
const (
	magic = "\x00atoll-s"
	// greetingEnd makes an HTTP server that knows none of this answer at once.
	greetingEnd = "\r\n\r\n"

	idSize    = 16
	frameHead = 4
	maxData   = 32 << 10 // bytes of one frame
	maxToken  = 255
	maxReason = 1 << 10
)

// what a greeting asks for.
const (
	askNew    = 'n' // a connection to a port
	askResume = 'r' // one that there is
)

// verdicts of an answer.
const (
	saidYes     = 'y'
	saidRefused = 'f' // nothing listens on the port
	saidUnknown = 'u' // there is no such stream, or not that much is kept of it
	saidDenied  = 'd' // the token is not the sandbox's
	saidFull    = 'm' // there are too many streams
)

// kinds of frames.
const (
	kindData   = 'd'
	kindFinish = 'f' // no more data will follow
	kindClose  = 'c' // and none will be read
	kindAck    = 'a' // number of what was taken, 8 bytes
)

type id [idSize]byte

type greeting struct {
	what     byte
	stream   id
	port     uint16
	received int64
	token    string
}

func (g greeting) encode() []byte {
	b := append([]byte(magic), g.what)
	b = append(b, g.stream[:]...)
	b = binary.BigEndian.AppendUint16(b, g.port)
	b = binary.BigEndian.AppendUint64(b, uint64(g.received))
	b = append(b, byte(len(g.token)))
	return append(append(b, g.token...), greetingEnd...)
}

var errGreeting = errors.New("not a greeting")

func readGreeting(r io.Reader) (g greeting, err error) {
	var head [len(magic) + 1 + idSize + 2 + 8 + 1]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return g, err
	}
	rest := head[len(magic):]
	g.what = rest[0]
	copy(g.stream[:], rest[1:])
	rest = rest[1+idSize:]
	g.port = binary.BigEndian.Uint16(rest)
	g.received = int64(binary.BigEndian.Uint64(rest[2:]))
	if string(head[:len(magic)]) != magic || g.received < 0 || g.port == 0 || g.what != askNew && g.what != askResume {
		return g, errGreeting
	}
	token := make([]byte, int(rest[10])+len(greetingEnd))
	_, err = io.ReadFull(r, token)
	g.token = string(token[:rest[10]])
	return g, err
}

type answer struct {
	verdict  byte
	received int64
	reason   string
}

func (a answer) encode() []byte {
	b := append([]byte(magic), a.verdict)
	b = binary.BigEndian.AppendUint64(b, uint64(a.received))
	reason := a.reason[:min(len(a.reason), maxReason)]
	b = binary.BigEndian.AppendUint16(b, uint16(len(reason)))
	return append(b, reason...)
}

// errForeign says that the other end speaks something else.
var errForeign = errors.New("the guest knows no lasting connections")

func readAnswer(r io.Reader) (a answer, err error) {
	var first [1]byte
	if _, err := io.ReadFull(r, first[:]); err != nil {
		return a, err
	}
	if first[0] != magic[0] {
		return a, errForeign
	}
	var head [len(magic) + 10]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return a, err
	}
	if string(head[:len(magic)-1]) != magic[1:] {
		return a, errForeign
	}
	rest := head[len(magic)-1:]
	a.verdict, a.received = rest[0], int64(binary.BigEndian.Uint64(rest[1:]))
	n := int(binary.BigEndian.Uint16(rest[9:]))
	if n > maxReason || a.received < 0 {
		return a, errGreeting
	}
	reason := make([]byte, n)
	_, err = io.ReadFull(r, reason)
	a.reason = string(reason)
	return a, err
}

// err is what a verdict means.
func (a answer) err() error {
	const op = "lasting.Dial"
	switch a.verdict {
	case saidYes:
		return nil
	case saidRefused:
		return sandbox.Errorf(op, sandbox.Unavailable, "", "%s", a.reason)
	case saidUnknown:
		return sandbox.Errorf(op, sandbox.NotFound, "", "the guest has no such connection any more")
	case saidDenied:
		return sandbox.Errorf(op, sandbox.Denied, "", "the guest does not accept the token")
	case saidFull:
		return sandbox.Errorf(op, sandbox.Exhausted, "", "the guest has too many connections")
	}
	return sandbox.Errorf(op, sandbox.Unavailable, "", "the guest answers %q", a.verdict)
}

func appendFrame(b []byte, kind byte, payload []byte) []byte {
	n := len(payload)
	return append(append(b, kind, byte(n>>16), byte(n>>8), byte(n)), payload...)
}

func appendAck(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(append(b, kindAck, 0, 0, 8), uint64(n))
}

// readFrame reads one frame; data goes into buf, which holds maxData bytes. ack is that of kindAck.
func readFrame(r *bufio.Reader, buf []byte) (kind byte, data []byte, ack int64, err error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, 0, err
	}
	kind = head[0]
	n := int(head[1])<<16 | int(head[2])<<8 | int(head[3])
	switch {
	case kind == kindData && n > 0 && n <= maxData, (kind == kindFinish || kind == kindClose) && n == 0:
	case kind == kindAck && n == 8:
		var number [8]byte
		_, err = io.ReadFull(r, number[:])
		return kind, nil, int64(binary.BigEndian.Uint64(number[:])), err
	default:
		return 0, nil, 0, fmt.Errorf("a frame %q of %d bytes", kind, n)
	}
	_, err = io.ReadFull(r, buf[:n])
	return kind, buf[:n], 0, err
}

// newReader reads a carrier.
func newReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, maxData) }
