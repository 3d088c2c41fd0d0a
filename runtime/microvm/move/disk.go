package move

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/xxh3"
)

const (
	blockSize     = 64 << 10 // bytes of the disk's layer that are compared and sent at once
	maxDiskBlocks = 1 << 24  // 1 TiB
)

// layer is the uppermost layer of a disk on its way: a file that grows and that QEMU writes while it is read. What is read
// then may be half of something; it is read again once QEMU writes no more.
type layer struct {
	file io.ReaderAt
	sent map[uint32]xxh3.Uint128 // sums of blocks as they were sent
	buf  []byte
}

func newLayer(file io.ReaderAt) *layer {
	return &layer{file: file, sent: make(map[uint32]xxh3.Uint128), buf: make([]byte, blockSize)}
}

// changed calls send with each block that is not what was sent of it last.
func (l *layer) changed(send func(n uint32, data []byte)) error {
	for n := uint32(0); ; n++ {
		got, err := l.file.ReadAt(l.buf, int64(n)*blockSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == maxDiskBlocks {
			return errors.New("the disk is too large to move while it is written")
		}
		if sum := xxh3.Hash128(l.buf[:got]); got > 0 && l.sent[n] != sum {
			l.sent[n] = sum
			send(n, l.buf[:got])
		}
		if got < blockSize {
			return nil
		}
	}
}

// blocks sends what has changed of the disk.
func (s *sender) blocks() error {
	if s.disk == nil {
		return nil
	}
	return s.disk.changed(func(n uint32, data []byte) {
		s.stats.Blocks++
		s.record(recDisk, n)
		_, _ = s.out.Write(binary.BigEndian.AppendUint32(nil, uint32(len(data))))
		_, _ = s.out.Write(data) // a failed write stays in s.out
		_, _ = s.sum.Write(data)
	})
}

// putBlock writes a block of the disk.
func (r *receiver) putBlock(n uint32) error {
	var length [4]byte
	if _, err := io.ReadFull(r.in, length[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > blockSize {
		return fmt.Errorf("a block of %d bytes of the disk", size)
	}
	data := r.raw[:size]
	if _, err := io.ReadFull(r.in, data); err != nil {
		return err
	}
	r.stats.Blocks++
	_, _ = r.sum.Write(data)
	_, err := r.disk.WriteAt(data, int64(n)*blockSize)
	return err
}
