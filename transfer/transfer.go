// Package transfer turns what is new in a byte image into few bytes, and those bytes back into the image.
//
// An image is any run of bytes: a disk, a memory, a file. The sender has the new image and, as a rule, an older one that
// the receiver has too, the base. A delta names its base by digest and says for each unit of the new image (a page of
// 4 KB) where its bytes come from:
//
//   - from the base at the same offset, or at another one, aligned to pages or not;
//   - from an earlier page of the new image;
//   - from nowhere, because they are zero;
//   - from the literals of the delta, in frames. What a frame is packed with follows from what is in it, the link and the
//     processor (package pack). Its dictionary consists of those pages of the base, and of those earlier in the new image,
//     that have the most content in common with it.
//
// What the encoder looks for is its Method; the format is one, and the decoder does not care. docs/delta.md describes it.
//
// All working memory is bounded, whatever the size of the images and whatever a delta claims.
package transfer

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/atoll-run/atoll/chunk/pack"
)

// The ways in which a delta cannot be used. Errors of this package wrap one of them, an error of the caller's readers
// and writers, or a context's error.
var (
	ErrCorrupt   = errors.New("the delta is damaged")
	ErrTruncated = errors.New("the delta ends too early")
	ErrVersion   = errors.New("this is no delta, or one of another version")
	ErrWrongBase = errors.New("the delta was made against another base")
	ErrTooLarge  = errors.New("the image is larger than allowed")
	ErrNoRandom  = errors.New("the delta was not made for random access")
	ErrOption    = errors.New("an option or a file cannot be used")
	ErrIndex     = errors.New("the index is damaged or belongs to another image")
)

// Sizes in bytes.
const (
	pageSize    = 4 << 10
	segmentSize = 1 << 20 // what is read, hashed and scanned at a time
	maxUnit     = 1 << 20
	maxImage    = 1 << 40

	// DefaultFrame is how many literals a frame holds, maxFrame how many it may.
	DefaultFrame = 4 << 20
	maxFrame     = 16 << 20
	// maxDictionary bounds a frame's dictionary.
	maxDictionary = pack.MaxDictionary

	maxGroupUnits = 1 << 18 // bounds the map of a group
	maxMap        = 8 << 20 // a map at its largest, before compression
)

// A Digest is a BLAKE3 hash.
type Digest [32]byte

// String returns the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// An Image is a run of bytes that can be read anywhere, also by several goroutines at once. Beyond its end it counts as
// zero.
type Image struct {
	At   io.ReaderAt // nil for an image that is not held
	Size int64       // in bytes
}

// check reports whether the image can be dealt with.
func (m Image) check() error {
	if m.Size < 0 || m.Size > maxImage {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, m.Size)
	}
	return nil
}

// read fills p with the bytes at off; what lies beyond the end is zero.
func (m Image) read(p []byte, off int64) error {
	n := int(max(0, min(int64(len(p)), m.Size-off)))
	if s, ok := m.At.(*sparseFile); ok && s.empty(off, int64(n)) {
		n = 0
	}
	if n > 0 {
		if got, err := m.At.ReadAt(p[:n], off); got < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // shorter than was said
			}
			return fmt.Errorf("reading %d bytes at %d: %w", n, off, err)
		}
	}
	clear(p[n:])
	return nil
}

// units returns how many units of the given size the image has, the last one perhaps in part.
func (m Image) units(unit int) int64 { return (m.Size + int64(unit) - 1) / int64(unit) }

// isZero reports whether p has only zero bytes.
func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if string(p[:len(zeros)]) != string(zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return string(p) == string(zeros[:len(p)])
}

var zeros [pageSize]byte
