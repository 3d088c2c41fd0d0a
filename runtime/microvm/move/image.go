package move

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/xxh3"
)

// maxIndexed is up to where the image is known by its content, in pages: 1 GiB, whose index takes some 10 MB while a machine is sent.
const maxIndexed = 1 << 18

// image finds pages of the machine's memory in the image that it reads from: what its programs and files are, as its page cache
// has it.
type image struct {
	file io.ReaderAt       // nil: none
	at   map[uint64]uint32 // page of the image by the sum of its content
	buf  [pageSize]byte
}

// newImage reads the image once.
func newImage(file io.ReaderAt) (*image, error) {
	m := &image{file: file, at: make(map[uint64]uint32)}
	if file == nil {
		return m, nil
	}
	buf := make([]byte, 1<<20)
	for first := uint32(0); first < maxIndexed; first += uint32(len(buf) / pageSize) {
		got, err := file.ReadAt(buf, int64(first)*pageSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read the image that the machine is of: %w", err)
		}
		for i := 0; i+pageSize <= got; i += pageSize {
			if page := buf[i : i+pageSize]; !bytes.Equal(page, zeroPage[:]) {
				m.at[xxh3.Hash(page)] = first + uint32(i/pageSize)
			}
		}
		if got < len(buf) {
			break
		}
	}
	return m, nil
}

// find returns which page of the image has this content.
func (m *image) find(page []byte) (n uint32, ok bool) {
	if len(m.at) == 0 {
		return 0, false
	}
	if n, ok = m.at[xxh3.Hash(page)]; !ok {
		return 0, false
	}
	_, err := m.file.ReadAt(m.buf[:], int64(n)*pageSize)
	return n, err == nil && bytes.Equal(m.buf[:], page) // else it is sent as others are
}

// fromImage reads a page that the sender found in the image.
func (r *receiver) fromImage() error {
	var field [4]byte
	if _, err := io.ReadFull(r.in, field[:]); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(field[:]))
	if r.refs.base.Image == nil {
		return errors.New("a page of an image that is not here")
	}
	if _, err := r.refs.base.Image.ReadAt(r.page[:], n*pageSize); err != nil {
		return fmt.Errorf("read page %d of the image: %w", n, err)
	}
	return nil
}
