package pack

import "fmt"

// A With is what both sides hold beside the bytes of a frame. The receiver must know both to be the same: a frame has no
// hash of them, nor of its content.
type With struct {
	Prior      []byte // the earlier version, of a plan that is Against it
	Dictionary []byte // what the bytes have much in common with; at most MaxDictionary, for Zstd without planes
}

// A frame is its head (1 byte) and the payload. The head has the coder in its bits 0 and 1, the planes divided by 2 in bits
// 2 and 3, and says in bit 4 that the payload is the difference from the prior version, in bit 5 that it needs the dictionary.
const (
	headPlanes     = 2
	headPrior      = 1 << 4
	headDictionary = 1 << 5
)

// AppendFrame appends the frame of data to dst. When the plan saves nothing, the bytes are stored.
func AppendFrame(dst, data []byte, with With, p Plan) ([]byte, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("pack: %d bytes are more than %d", len(data), MaxSize)
	}
	head := byte(p.Coder) | byte(p.Planes/2)<<headPlanes
	if p.Against {
		head |= headPrior
	} else {
		with.Prior = nil
	}
	if p.Planes > 0 || p.Coder != Zstd {
		with.Dictionary = nil
	}
	if len(with.Dictionary) > 0 {
		head |= headDictionary
	}
	begin := len(dst)
	dst, err := appendBody(append(dst, head), data, with, p)
	if err != nil {
		return nil, err
	}
	if len(dst)-begin-1 < len(data) {
		return dst, nil
	}
	return append(append(dst[:begin], byte(Stored)), data...), nil
}

// NeedsPrior reports whether a frame is the difference from the prior version.
func NeedsPrior(frame []byte) bool { return len(frame) > 0 && frame[0]&headPrior != 0 }

// OpenFrame returns the content of a frame, which the caller has bounded and knows to be of so many bytes.
func OpenFrame(frame []byte, with With, size int) ([]byte, error) {
	if len(frame) == 0 {
		return nil, fmt.Errorf("%w: too short", ErrCorrupt)
	}
	head := frame[0]
	e := opened{coder: Coder(head & 3), planes: int(head>>headPlanes&3) * 2, against: head&headPrior != 0, size: size, payload: frame[1:]}
	dictionary := head&headDictionary != 0
	switch {
	case head >= headDictionary<<1, e.coder > Zstd, e.planes > 4, dictionary && (e.planes > 0 || e.coder != Zstd):
		return nil, fmt.Errorf("%w: a head that is not known", ErrCorrupt)
	case e.against && with.Prior == nil:
		return nil, ErrPrior
	case !e.against:
		with.Prior = nil
	}
	if !dictionary {
		with.Dictionary = nil
	}
	return e.body(with)
}

// appendBody appends what a plan makes of data.
func appendBody(dst, data []byte, with With, p Plan) ([]byte, error) {
	body := data
	if with.Prior != nil {
		body = xored(body, with.Prior)
	}
	if p.Planes > 0 {
		body = split(body, p.Planes)
	}
	var err error
	for _, part := range parts(body, p) {
		if dst, err = encode(dst, part, with.Dictionary, p); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

// body undoes appendBody.
func (e opened) body(with With) ([]byte, error) {
	body, err := decode(e, with.Dictionary)
	if err != nil {
		return nil, err
	}
	if e.planes > 0 {
		body = join(body, e.planes)
	}
	if with.Prior != nil {
		body = xored(body, with.Prior)
	}
	return body, nil
}
