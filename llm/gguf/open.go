package gguf

import (
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// A Reader is an open file. It can be used from several goroutines, except for
// Close, after which nothing that Bytes returned may be touched.
type Reader struct {
	*File
	file   *os.File
	mapped []byte // nil until Map
}

// Open opens a file and reads its front. Errors are NotFound, Denied or Invalid.
func Open(name string) (*Reader, error) {
	const op = "gguf.Open"
	file, err := os.Open(filepath.Clean(name))
	if err != nil {
		kind := sandbox.Internal
		switch {
		case os.IsNotExist(err):
			kind = sandbox.NotFound
		case os.IsPermission(err):
			kind = sandbox.Denied
		}
		return nil, sandbox.E(op, kind, name, err)
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = sandbox.Errorf(op, sandbox.Invalid, name, "not a regular file")
	}
	var front *File
	if err == nil {
		front, err = Decode(file, info.Size())
	}
	if err != nil {
		_ = file.Close()
		return nil, sandbox.E(op, "", name, err)
	}
	return &Reader{File: front, file: file}, nil
}

// Map maps the whole file into memory, read-only, so that Bytes works. Whoever
// truncates a mapped file kills the process that reads it; files that others can
// write to are to be read with ReadAt. It must not run beside itself.
func (r *Reader) Map() error {
	if r.mapped != nil {
		return nil
	}
	// Not the size of the file: what comes after the tensors is none of ours, and
	// the file may have grown.
	b, err := unix.Mmap(int(r.file.Fd()), 0, int(r.End()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return sandbox.E("gguf.Map", sandbox.Exhausted, r.file.Name(), err)
	}
	r.mapped = b
	return nil
}

// Bytes returns the data of a tensor of this file, which must not be written
// to; nil before Map. Pages come from disk as they are touched.
func (r *Reader) Bytes(t *Tensor) []byte {
	if r.mapped == nil {
		return nil
	}
	return r.mapped[t.Offset : t.Offset+t.Size : t.Offset+t.Size]
}

// Section returns a reader of a tensor's data, for reading it into memory of
// one's own.
func (r *Reader) Section(t *Tensor) *io.SectionReader {
	return io.NewSectionReader(r.file, t.Offset, t.Size)
}

// ReadAt reads from the file, at any place.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) { return r.file.ReadAt(p, off) }

// Close unmaps and closes the file.
func (r *Reader) Close() error {
	if r.mapped != nil {
		_ = unix.Munmap(r.mapped) // it was mapped whole, so this cannot fail
		r.mapped = nil
	}
	return r.file.Close()
}
