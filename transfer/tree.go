package transfer

import (
	"context"
	"encoding/binary"
	"sync"

	"github.com/zeebo/blake3"
)

// A Tree holds the strong hashes of an image's segments of 1 MiB, from which its digest is made. Parts that are known to
// be equal or zero need not be hashed again, and segments are hashed at once.
type Tree struct {
	size     int64
	segments []Digest
}

// treeContext keeps digests of trees apart from all other hashes.
const treeContext = "atoll.run 2026 transfer image tree"

// Root returns the digest of the image: BLAKE3, keyed by a context, of its size and its segments' digests.
func (t *Tree) Root() Digest {
	h := blake3.NewDeriveKey(treeContext)
	_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(t.size))) // a hash does not fail
	for i := range t.segments {
		_, _ = h.Write(t.segments[i][:])
	}
	var d Digest
	h.Sum(d[:0])
	return d
}

// Size returns the image's size in bytes.
func (t *Tree) Size() int64 { return t.size }

// segment returns the bounds of segment i of an image.
func segment(size int64, i int) (off int64, n int) {
	off = int64(i) * segmentSize
	return off, int(min(segmentSize, size-off))
}

func segments(size int64) int { return int((size + segmentSize - 1) / segmentSize) }

// zeroSegment is the hash of a whole segment of zeros.
var zeroSegment = sync.OnceValue(func() Digest { return blake3.Sum256(make([]byte, segmentSize)) })

// hashSegment hashes the bytes of a segment, without padding.
func hashSegment(p []byte) Digest {
	if len(p) == segmentSize && isZero(p) {
		return zeroSegment()
	}
	return blake3.Sum256(p)
}

// HashImage reads an image and returns its tree.
func HashImage(ctx context.Context, m Image) (*Tree, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	t := &Tree{size: m.Size}
	pipe := newPipeline(ctx, func(d Digest) error {
		t.segments = append(t.segments, d)
		return nil
	})
	for i := range segments(m.Size) {
		if err := pipe.submit(func() (Digest, error) {
			buf := getSegment()
			defer putSegment(buf)
			off, n := segment(m.Size, i)
			if err := m.read(buf[:n], off); err != nil {
				return Digest{}, err
			}
			return hashSegment(buf[:n]), nil
		}); err != nil {
			break // close says why
		}
	}
	if err := pipe.close(); err != nil {
		return nil, err
	}
	return t, nil
}
