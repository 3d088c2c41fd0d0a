package gguf

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/sandbox"
)

// A Reader is an open file, or all parts of one. It can be used from several goroutines, except for Close.
type Reader struct {
	*File
	files []*os.File
	data  io.ReaderAt
}

// Open opens a file and reads its front. When it is a part of a model, by name and content, all parts are opened as one
// file; they lie beside it. Errors are NotFound, Denied or Invalid.
func Open(name string) (*Reader, error) {
	r, front, _, err := openOne(name)
	if err != nil {
		return nil, err
	}
	names := PartNames(name)
	if _, split := front.Meta.Int(keySplitCount); !split || len(names) < 2 {
		r.File = front
		return r, nil
	}
	_ = r.Close() // it is opened again in its place
	var parts []*File
	var data []io.ReaderAt
	var sizes []int64
	whole := &Reader{}
	for _, name := range names {
		r, front, size, err := openOne(name)
		if err != nil {
			return nil, errors.Join(err, whole.Close())
		}
		whole.files, data = append(whole.files, r.files[0]), append(data, r.data)
		parts, sizes = append(parts, front), append(sizes, size)
	}
	whole.data = Concat(data, sizes)
	if whole.File, err = Join(parts, sizes); err != nil {
		return nil, errors.Join(sandbox.E("gguf.Open", sandbox.Invalid, name, err), whole.Close())
	}
	return whole, nil
}

// openOne opens a file by itself.
func openOne(name string) (r *Reader, front *File, size int64, err error) {
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
		return nil, nil, 0, sandbox.E(op, kind, name, err)
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = sandbox.Errorf(op, sandbox.Invalid, name, "not a regular file")
	}
	if err == nil {
		front, err = Decode(file, info.Size())
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, 0, sandbox.E(op, "", name, err)
	}
	return &Reader{files: []*os.File{file}, data: file}, front, info.Size(), nil
}

// Section returns a reader of a tensor's data.
func (r *Reader) Section(t *Tensor) *io.SectionReader {
	return io.NewSectionReader(r.data, t.Offset, t.Size)
}

// ReadAt reads from the file, at any place.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) { return r.data.ReadAt(p, off) }

// Close closes the file.
func (r *Reader) Close() error {
	var err error
	for _, f := range r.files {
		err = errors.Join(err, f.Close())
	}
	return err
}
