package transfer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// An index as it is kept: "ATLX", version (1 byte), size of the image (8 bytes), the digests of its segments, its pages
// and its anchors, and the BLAKE3 hash of all that. A table is a list of the slots in use: how many slots lie between it
// and the one before, plus 1 (varint), and what it holds (8 bytes); 0 ends it. Fixed numbers are little endian.
const (
	indexMagic   = "ATLX"
	indexVersion = 1
)

// WriteTo writes the index, to be kept beside its image. It takes about 1/14 of the image's bytes that are not zero.
func (x *Index) WriteTo(w io.Writer) (int64, error) {
	h := blake3.New()
	count := &countWriter{w: w}
	b := bufio.NewWriterSize(io.MultiWriter(count, h), 64<<10)
	head := binary.LittleEndian.AppendUint64(append([]byte(indexMagic), indexVersion), uint64(x.tree.size))
	_, _ = b.Write(head) // a bufio.Writer keeps its first error for Flush
	for i := range x.tree.segments {
		_, _ = b.Write(x.tree.segments[i][:])
	}
	var slot [binary.MaxVarintLen64 + 8]byte
	for _, table := range [][]uint64{x.pages, x.anchors} {
		last := -1
		for i, v := range table {
			if v == 0 {
				continue
			}
			p := binary.AppendUvarint(slot[:0], uint64(i-last))
			_, _ = b.Write(binary.LittleEndian.AppendUint64(p, v))
			last = i
		}
		_ = b.WriteByte(0)
	}
	if err := b.Flush(); err != nil {
		return count.n, err
	}
	_, err := count.Write(h.Sum(nil))
	return count.n, err
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// ReadIndex reads an index that was kept beside an image of size bytes. That the image has not changed since is up to the
// caller; if it has, deltas name a base that nobody has.
func ReadIndex(r io.Reader, size int64) (*Index, error) {
	if err := (Image{Size: size}).check(); err != nil {
		return nil, err
	}
	in := &hashReader{r: bufio.NewReaderSize(r, 64<<10), h: blake3.New()}
	head := make([]byte, len(indexMagic)+1+8)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, indexError(err)
	}
	if string(head[:4]) != indexMagic || head[4] != indexVersion || binary.LittleEndian.Uint64(head[5:]) != uint64(size) {
		return nil, fmt.Errorf("%w: it does not begin as one of %d bytes", ErrIndex, size)
	}
	x := newIndex(size)
	x.tree.segments = make([]Digest, segments(size))
	for i := range x.tree.segments {
		if _, err := io.ReadFull(in, x.tree.segments[i][:]); err != nil {
			return nil, indexError(err)
		}
	}
	for _, table := range [][]uint64{x.pages, x.anchors} {
		if err := in.table(table); err != nil {
			return nil, indexError(err)
		}
	}
	want := in.h.Sum(nil)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(in.r, got); err != nil {
		return nil, indexError(err)
	}
	if string(got) != string(want) {
		return nil, fmt.Errorf("%w: its hash is another", ErrIndex)
	}
	return x, nil
}

func indexError(err error) error { return fmt.Errorf("%w: %w", ErrIndex, err) }

// A hashReader hashes what is read.
type hashReader struct {
	r *bufio.Reader
	h *blake3.Hasher
}

func (h *hashReader) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	_, _ = h.h.Write(p[:n])
	return n, err
}

// table fills a table.
func (h *hashReader) table(table []uint64) error {
	at := -1
	for {
		// A varint and 8 bytes lie in the buffer, but for the end of the file.
		head, err := h.r.Peek(binary.MaxVarintLen64 + 8)
		if len(head) == 0 {
			return err
		}
		gap, n := binary.Uvarint(head)
		if gap == 0 && n == 1 {
			_, err := io.CopyN(io.Discard, h, 1)
			return err
		}
		if n <= 0 || len(head) < n+8 || gap == 0 || gap > uint64(len(table)) || at+int(gap) >= len(table) {
			return errors.New("a slot beyond the table, or cut short")
		}
		at += int(gap)
		table[at] = binary.LittleEndian.Uint64(head[n:])
		_, _ = h.h.Write(head[:n+8])
		if _, err := h.r.Discard(n + 8); err != nil {
			return err
		}
	}
}
