package transfer

import "sync"

// segmentBuffers are reused, since an image has thousands of segments.
var segmentBuffers = sync.Pool{New: func() any { return new([segmentSize]byte) }}

func getSegment() *[segmentSize]byte  { return segmentBuffers.Get().(*[segmentSize]byte) }
func putSegment(b *[segmentSize]byte) { segmentBuffers.Put(b) }

// A peeker reads pieces of an image that often lie one after the other, with one read for several. It is for one
// goroutine.
type peeker struct {
	image Image
	buf   []byte // what was read last
	off   int64  // where that lies
}

// ahead is how much a peeker reads when a piece follows the one before.
const ahead = 64 << 10

// at returns n bytes at an offset; they are valid until the next call.
func (k *peeker) at(off int64, n int) ([]byte, error) {
	if i := off - k.off; i >= 0 && i+int64(n) <= int64(len(k.buf)) {
		return k.buf[i : i+int64(n)], nil
	}
	size := n
	if end := k.off + int64(len(k.buf)); off >= k.off && off <= end+pageSize {
		size = max(n, ahead)
	}
	if cap(k.buf) < size {
		k.buf = make([]byte, 0, max(n, ahead))
	}
	k.buf = k.buf[:size]
	if err := k.image.read(k.buf, off); err != nil {
		k.buf = k.buf[:0]
		return nil, err
	}
	k.off = off
	return k.buf[:n], nil
}
