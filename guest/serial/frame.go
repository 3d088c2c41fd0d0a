package serial

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// On the port travel frames: a header of eight bytes, none of which has its top
// bit set, and a payload.
//
//	byte 0     kind
//	bytes 1-4  stream, 28 bits, seven to a byte, highest first
//	bytes 5-7  length of the payload, 21 bits, likewise
//
// A mark says that a new epoch begins and that whatever was under way is void.
// All its bytes have the top bit set, so it cannot lie across a header; a
// payload that contains it is cut in two in its middle. Hence the mark never
// occurs but where it is meant, and a reader that was left in the middle of a
// frame, as a restored machine's is, finds its way back for certain.
const (
	headerSize = 8
	// maxPayload makes a frame fill one buffer of the guest's driver, 32 KiB.
	maxPayload = 32<<10 - headerSize
	maxStream  = 1<<28 - 1
)

var mark = []byte{0xa9, 0xd4, 0xef, 0x93, 0xfa, 0x86, 0xcd, 0xb1, 0xe5, 0x9c, 0xf2, 0x8b, 0xd7, 0xac, 0xc0, 0xfe}

// kind is what a frame means.
type kind byte

const (
	kindHello   kind = 1 + iota // stream 0, right behind a mark; payload: the epoch
	kindOpen                    // host to guest; payload: the port
	kindOpened                  // guest to host: the stream is connected
	kindRefused                 // guest to host: it is not; payload: the reason, ASCII
	kindData                    // payload: bytes of the stream
	kindCredit                  // payload: how many bytes more may be sent
	kindFinish                  // no more data will follow
	kindClose                   // neither will be more sent nor read: the stream is forgotten
	kindAsk                     // host to guest, stream 0; payload: a question
	kindAnswer                  // guest to host, stream 0; payload: what the question before it is answered
)

const (
	epochSize = 8
	maxReason = 512 // bytes
	// maxAsk bounds a question and its answer, in bytes.
	maxAsk = 8 << 10
)

// frame is one of them. Its payload is valid until the decoder is fed again.
type frame struct {
	kind    kind
	stream  uint32
	payload []byte
}

// appendFrame appends one frame. The payload is at most maxPayload bytes and
// holds no mark; only those of kindData, kindAsk and kindAnswer might.
func appendFrame(b []byte, k kind, stream uint32, payload []byte) []byte {
	n := len(payload)
	b = append(b, byte(k),
		byte(stream>>21&0x7f), byte(stream>>14&0x7f), byte(stream>>7&0x7f), byte(stream&0x7f),
		byte(n>>14&0x7f), byte(n>>7&0x7f), byte(n&0x7f))
	return append(b, payload...)
}

// appendHello appends what begins an epoch.
func appendHello(b []byte, epoch uint64) []byte {
	return appendFrame(append(b, mark...), kindHello, 0, binary.BigEndian.AppendUint64(nil, epoch))
}

func appendCredit(b []byte, stream uint32, n int) []byte {
	return appendFrame(b, kindCredit, stream, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

// cut returns how many of the first bytes of data go into one frame.
func cut(data []byte) int {
	n := min(len(data), maxPayload)
	if i := bytes.Index(data[:n], mark); i >= 0 {
		return i + len(mark)/2
	}
	return n
}

// errFrame is what a decoder says of bytes that are no frame.
var errFrame = errors.New("not a frame")

// decoder turns what was read from a port into frames. It buffers at most one
// frame and what it was last fed.
type decoder struct {
	buf     []byte
	pos     int // what is before has been dealt with
	scanned int // at or after pos; no mark begins before it
	synced  bool
}

// feed adds what was read. It voids the payloads of frames returned before.
func (d *decoder) feed(p []byte) {
	d.buf = append(d.buf[:copy(d.buf, d.buf[d.pos:])], p...)
	d.scanned -= d.pos
	d.pos = 0
}

// next returns the next frame. ok is false when more must be fed. A mark makes
// it forget all that came before and go on with the hello behind it. It skips
// all bytes until the first mark, and again after an error.
func (d *decoder) next() (f frame, ok bool, err error) {
	for {
		i := bytes.Index(d.buf[d.scanned:], mark)
		if i < 0 {
			break
		}
		d.pos = d.scanned + i + len(mark)
		d.scanned = d.pos
		d.synced = true
	}
	d.scanned = max(d.scanned, len(d.buf)-len(mark)+1)
	if !d.synced {
		d.pos = d.scanned
		return frame{}, false, nil
	}
	rest := d.buf[d.pos:]
	if len(rest) < headerSize {
		return frame{}, false, nil
	}
	f, n, err := parseHeader(rest)
	if err != nil {
		d.synced = false
		return frame{}, false, err
	}
	if len(rest) < headerSize+n {
		return frame{}, false, nil
	}
	f.payload = rest[headerSize : headerSize+n]
	d.pos += headerSize + n
	d.scanned = max(d.scanned, d.pos)
	return f, true, nil
}

// parseHeader reads the header that b begins with and returns the payload's length.
func parseHeader(b []byte) (frame, int, error) {
	for _, c := range b[:headerSize] {
		if c >= 0x80 {
			return frame{}, 0, errFrame
		}
	}
	f := frame{kind: kind(b[0]), stream: uint32(b[1])<<21 | uint32(b[2])<<14 | uint32(b[3])<<7 | uint32(b[4])}
	n := int(b[5])<<14 | int(b[6])<<7 | int(b[7])
	var right bool
	switch f.kind {
	case kindHello:
		right = n == epochSize
	case kindOpen:
		right = n == 2
	case kindCredit:
		right = n == 4
	case kindOpened, kindFinish, kindClose:
		right = n == 0
	case kindRefused:
		right = n <= maxReason
	case kindAsk, kindAnswer:
		right = n <= maxAsk
	case kindData:
		right = n > 0 && n <= maxPayload
	}
	if !right {
		return frame{}, 0, fmt.Errorf("%w: kind %d with %d bytes", errFrame, f.kind, n)
	}
	return f, n, nil
}
