// Package pack makes runs of bytes small in the way that suits them, and large again.
//
// What suits them depends on what they hold (Look), on how fast the link and the processor are (Meter), and is decided by
// a pure function (Choose). The result is an envelope that says by itself how to open it:
//
//	transform (1 byte), coder (1 byte), size of the content (uvarint), BLAKE3 of the prior version (32 bytes, if the
//	transform is against one), payload
//
// Floating-point numbers are split into planes, the first bytes of all numbers, then all second ones: exponents repeat,
// mantissas do not. A newer version of weights is packed as its difference from the version that both sides hold.
//
// Whoever knows size, prior version and hash from elsewhere takes a frame instead (AppendFrame), which has a head of one byte
// and may use a dictionary. Both are packed and opened in the same way.
package pack

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

// The ways in which an envelope cannot be opened.
var (
	ErrCorrupt = errors.New("the packed bytes are damaged")
	ErrPrior   = errors.New("the bytes were packed against another version")
)

// A Coder is how bytes are written once they are transformed.
type Coder byte

// The coders, from the fastest.
const (
	Stored Coder = iota
	S2
	Zstd
)

// A Plan is how to pack: the zero value stores.
type Plan struct {
	Planes  int // 2 for 16-bit numbers, 4 for 32-bit ones, 0 for anything else
	Coder   Coder
	Level   zstd.EncoderLevel // of Zstd; the decoder does not care
	Against bool              // of a frame: the difference from the prior version is packed
}

// The transforms of an envelope: the number of planes, or one of these.
const (
	transformPrior = 0x10 // a flag beside the planes
	transformZero  = 0x20 // nothing but zeros, no payload
)

// MaxSize bounds what is packed at once, in bytes.
const MaxSize = 16 << 20

// Append appends the envelope of data to dst. prior is the earlier version that the receiver holds, or nil: with one, the
// plan is applied to the difference. When the plan saves nothing, the bytes are stored.
func Append(dst, data, prior []byte, p Plan) ([]byte, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("pack: %d bytes are more than %d", len(data), MaxSize)
	}
	if isZero(data) {
		return binary.AppendUvarint(append(dst, transformZero, byte(Stored)), uint64(len(data))), nil
	}
	begin := len(dst)
	transform := byte(p.Planes)
	if prior != nil {
		transform |= transformPrior
	}
	dst = binary.AppendUvarint(append(dst, transform, byte(p.Coder)), uint64(len(data)))
	if prior != nil {
		sum := blake3.Sum256(prior)
		dst = append(dst, sum[:]...)
	}
	head := len(dst)
	dst, err := appendBody(dst, data, With{Prior: prior}, p)
	if err != nil {
		return nil, err
	}
	if len(dst)-head < len(data) {
		return dst, nil
	}
	dst = binary.AppendUvarint(append(dst[:begin], 0, byte(Stored)), uint64(len(data)))
	return append(dst, data...), nil
}

// parts cuts what is packed by itself: planes have statistics of their own, and zstd frames can follow each other.
func parts(body []byte, p Plan) [][]byte {
	if p.Planes == 0 || p.Coder != Zstd || len(body) < p.Planes {
		return [][]byte{body}
	}
	var out [][]byte
	n := len(body) / p.Planes
	for range p.Planes - 1 {
		out, body = append(out, body[:n]), body[n:]
	}
	return append(out, body)
}

func encode(dst, body, dictionary []byte, p Plan) ([]byte, error) {
	switch p.Coder {
	case Stored:
		return append(dst, body...), nil
	case S2:
		return append(dst, s2.Encode(nil, body)...), nil
	case Zstd:
		return compress(dst, body, dictionary, p.Level)
	}
	return nil, fmt.Errorf("pack: there is no coder %d", p.Coder)
}

// Prior returns the BLAKE3 hash of the version that an envelope was packed against; ok is false when it stands alone.
func Prior(envelope []byte) (sum [32]byte, ok bool) {
	e, err := parse(envelope, MaxSize)
	return e.prior, err == nil && e.against
}

// An opened envelope is what its head says.
type opened struct {
	planes  int
	zero    bool
	against bool
	prior   [32]byte
	coder   Coder
	size    int
	payload []byte
}

func parse(b []byte, limit int) (e opened, err error) {
	if len(b) < 3 {
		return e, fmt.Errorf("%w: too short", ErrCorrupt)
	}
	transform := b[0]
	e.coder = Coder(b[1])
	size, n := binary.Uvarint(b[2:])
	if n <= 0 || size > uint64(min(limit, MaxSize)) {
		return e, fmt.Errorf("%w: the size is more than %d", ErrCorrupt, limit)
	}
	e.size, e.payload = int(size), b[2+n:]
	if transform == transformZero {
		e.zero = true
		if len(e.payload) > 0 || e.coder != Stored {
			return e, fmt.Errorf("%w: zeros with something behind", ErrCorrupt)
		}
		return e, nil
	}
	e.against, e.planes = transform&transformPrior != 0, int(transform&^transformPrior)
	if e.planes != 0 && e.planes != 2 && e.planes != 4 || e.coder > Zstd {
		return e, fmt.Errorf("%w: a transform or coder that is not known", ErrCorrupt)
	}
	if e.against {
		if len(e.payload) < len(e.prior) {
			return e, fmt.Errorf("%w: too short", ErrCorrupt)
		}
		e.payload = e.payload[copy(e.prior[:], e.payload):]
	}
	return e, nil
}

// Open returns the content of an envelope, at most limit bytes of it, whatever the envelope claims. prior is the version
// that it was packed against; nil when there is none. The caller compares the content with its hash.
func Open(envelope, prior []byte, limit int) ([]byte, error) {
	e, err := parse(envelope, limit)
	if err != nil {
		return nil, err
	}
	if e.zero {
		return make([]byte, e.size), nil
	}
	if e.against && (prior == nil || blake3.Sum256(prior) != e.prior) {
		return nil, ErrPrior
	}
	if !e.against {
		prior = nil
	}
	return e.body(With{Prior: prior})
}

// decode returns exactly e.size bytes.
func decode(e opened, dictionary []byte) (body []byte, err error) {
	switch e.coder {
	case Stored:
		body = append([]byte(nil), e.payload...)
	case S2:
		if n, err := s2.DecodedLen(e.payload); err != nil || n != e.size {
			return nil, fmt.Errorf("%w: another size", ErrCorrupt)
		}
		body, err = s2.Decode(nil, e.payload)
	case Zstd:
		body, err = decompress(e.payload, dictionary, e.size)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if len(body) != e.size {
		return nil, fmt.Errorf("%w: %d bytes, not %d", ErrCorrupt, len(body), e.size)
	}
	return body, nil
}
