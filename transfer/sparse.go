package transfer

import (
	"cmp"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A sparseFile knows where a file, which does not change, has nothing stored, so that zeros are not read from it. At most
// maxExtents of what it has are remembered; what is behind the last one is read. It is safe for use by several goroutines.
type sparseFile struct {
	*os.File
	data []extent // ascending
}

type extent struct{ begin, end int64 }

// maxExtents bounds the memory for a file of many pieces: 16 bytes each.
const maxExtents = 1 << 16

func newSparseFile(f *os.File, size int64) *sparseFile {
	s := &sparseFile{File: f}
	fd := int(f.Fd())
	for at := int64(0); at < size; {
		begin, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO { // nothing but a hole follows
			return s
		}
		end := size
		if err == nil && len(s.data) < maxExtents-1 {
			end, err = unix.Seek(fd, begin, unix.SEEK_HOLE)
		}
		if err != nil { // a file system that cannot tell
			begin, end = at, size
		}
		s.data = append(s.data, extent{begin, end})
		at = end
	}
	return s
}

// empty reports whether n bytes at an offset are a hole.
func (s *sparseFile) empty(off, n int64) bool {
	i, _ := slices.BinarySearchFunc(s.data, off, func(e extent, off int64) int { return cmp.Compare(e.end, off+1) })
	return i == len(s.data) || s.data[i].begin >= off+n
}
