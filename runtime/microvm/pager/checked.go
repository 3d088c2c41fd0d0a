package pager

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/zeebo/blake3"
)

const (
	// chunkSize is the unit in which a file is checked, in bytes: what has to be
	// read to give out one page of it.
	chunkSize = 64 << 10
	// SumSize is the length of the sum of one chunk, in bytes.
	SumSize = 32
	// cachedChunks is how many chunks are kept that were read last, since
	// neighbouring pages are often asked for one after another.
	cachedChunks = 32
)

// ErrDamaged says that a file is not what it was when its sums were made.
var ErrDamaged = errors.New("the file is damaged")

// Summer makes the sums of what is written to it. Its zero value is ready.
type Summer struct {
	sums []byte
	hash *blake3.Hasher
	n    int // bytes of the chunk so far
}

// Write adds b, and never fails.
func (s *Summer) Write(b []byte) (int, error) {
	if s.hash == nil {
		s.hash = blake3.New()
	}
	written := len(b)
	for len(b) > 0 {
		part := b[:min(len(b), chunkSize-s.n)]
		_, _ = s.hash.Write(part) // never fails
		b, s.n = b[len(part):], s.n+len(part)
		if s.n == chunkSize {
			s.cut()
		}
	}
	return written, nil
}

func (s *Summer) cut() {
	s.sums = s.hash.Sum(s.sums)
	s.hash.Reset()
	s.n = 0
}

// Sums ends the last chunk and returns the sums of all, SumSize bytes each.
func (s *Summer) Sums() []byte {
	if s.n > 0 {
		s.cut()
	}
	return s.sums
}

// Checked reads a file at random and never gives out anything but what it was
// when its sums were made. It may be used from many goroutines.
type Checked struct {
	file   io.ReaderAt
	length int64
	sums   []byte
	late   *late // nil: all of the file is there

	mu    sync.Mutex
	cache [cachedChunks]chunk
}

// chunk is one chunk that was found to be right; data is never changed.
type chunk struct {
	index int64
	data  []byte // nil: none
}

// NewChecked returns a reader of the first length bytes of a file, which have these sums.
func NewChecked(file *os.File, length int64, sums []byte) (*Checked, error) {
	if length < 0 || int64(len(sums)) != SumCount(length)*SumSize {
		return nil, fmt.Errorf("%d bytes of sums for a file of %d bytes: %w", len(sums), length, ErrDamaged)
	}
	return &Checked{file: file, length: length, sums: sums}, nil
}

// SumCount is how many sums a file of length bytes has.
func SumCount(length int64) int64 { return (length + chunkSize - 1) / chunkSize }

// ReadAt implements io.ReaderAt. Its error wraps ErrDamaged when the file is not
// what it was.
func (c *Checked) ReadAt(b []byte, at int64) (n int, err error) { return c.readAt(b, at, false) }

// readAt is ReadAt; ahead: no machine waits for it.
func (c *Checked) readAt(b []byte, at int64, ahead bool) (n int, err error) {
	for len(b) > 0 {
		if at >= c.length {
			return n, io.EOF
		}
		data, err := c.chunk(at/chunkSize, ahead)
		if err != nil {
			return n, err
		}
		part := copy(b, data[at%chunkSize:])
		b, n, at = b[part:], n+part, at+int64(part)
	}
	return n, nil
}

// chunk returns one chunk, checked.
func (c *Checked) chunk(index int64, ahead bool) ([]byte, error) {
	slot := &c.cache[index%cachedChunks]
	c.mu.Lock()
	have := *slot
	c.mu.Unlock()
	if have.data != nil && have.index == index {
		return have.data, nil
	}
	data := make([]byte, min(chunkSize, c.length-index*chunkSize))
	var err error
	if c.late != nil {
		err = c.late.await(index, ahead, func() error { return c.read(data, index) })
	} else {
		err = c.read(data, index)
	}
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	*slot = chunk{index, data}
	c.mu.Unlock()
	return data, nil
}

// errShort is how a file is damaged that ends too early.
var errShort = fmt.Errorf("it has become shorter: %w", ErrDamaged)

// read reads one chunk and checks it.
func (c *Checked) read(data []byte, index int64) error {
	if _, err := c.file.ReadAt(data, index*chunkSize); err != nil {
		if errors.Is(err, io.EOF) {
			return errShort
		}
		return err
	}
	sum := blake3.Sum256(data)
	if !bytes.Equal(sum[:], c.sums[index*SumSize:][:SumSize]) {
		return fmt.Errorf("at byte %d: %w", index*chunkSize, ErrDamaged)
	}
	return nil
}
