package gguf

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/sandbox"
)

// New lays out a file of these tensors, of which Name, Type and Dims count;
// Offset and Size are set. It refuses what Decode would refuse. Errors are Invalid.
func New(meta Meta, tensors []Tensor) (*File, error) {
	f := &File{Version: versionNow, Meta: meta.Clone(), Alignment: defaultAlignment, Tensors: append([]Tensor(nil), tensors...)}
	err := f.layout()
	if err != nil {
		return nil, sandbox.E("gguf.New", sandbox.Invalid, "", err)
	}
	return f, nil
}

func (f *File) layout() error {
	f.Meta.Delete(KeyAlignment) // we keep to the default
	if f.Meta.Len() > maxKeys || len(f.Tensors) > maxTensors {
		return fmt.Errorf("%d metadata keys and %d tensors are too many", f.Meta.Len(), len(f.Tensors))
	}
	for i := range f.Tensors {
		t := &f.Tensors[i]
		if t.Name == "" || len(t.Name) > maxName {
			return fmt.Errorf("a tensor's name has 1 to %d bytes, not %d", maxName, len(t.Name))
		}
		n, err := size(t.Type, t.Dims)
		if err != nil {
			return fmt.Errorf("tensor %q: %w", t.Name, err)
		}
		t.Size = n
	}
	for key, v := range f.Meta.All() {
		if err := fits(v); err != nil {
			return fmt.Errorf("metadata %q: %w", key, err)
		}
	}
	// Offsets count from DataStart and have a fixed width, so that the header's
	// length does not depend on them.
	f.DataStart = align(int64(len(f.header())), f.Alignment)
	next := f.DataStart
	for i := range f.Tensors {
		f.Tensors[i].Offset = next
		next = align(next+f.Tensors[i].Size, f.Alignment)
	}
	return f.place(-1)
}

// fits refuses values that are too long to be read back.
func fits(value any) error {
	var all []string
	switch v := value.(type) {
	case string:
		all = []string{v}
	case []string:
		all = v
	}
	for _, s := range all {
		if len(s) > maxString {
			return fmt.Errorf("a string of %d bytes is too long", len(s))
		}
	}
	return nil
}

// Encode writes the file to w. data is called for each tensor in order and
// writes its bytes; to write more or fewer than its Size is an error. The error
// of data or of w is returned as it is.
func (f *File) Encode(w io.Writer, data func(w io.Writer, t *Tensor) error) error {
	out := &countingWriter{w: bufio.NewWriterSize(w, 1<<20)}
	if _, err := out.Write(f.header()); err != nil {
		return err
	}
	for i := range f.Tensors {
		t := &f.Tensors[i]
		if err := out.pad(t.Offset); err != nil {
			return err
		}
		if err := data(out, t); err != nil {
			return err
		}
		if got := out.n - t.Offset; got != t.Size {
			return sandbox.Errorf("gguf.Encode", sandbox.Internal, t.Name, "%d bytes were written of a tensor of %d", got, t.Size)
		}
	}
	if err := out.pad(align(f.End(), f.Alignment)); err != nil {
		return err
	}
	return out.w.Flush()
}

// Save writes the file to a name of the file system, whole or not at all: it is
// written beside and renamed when it is on disk.
func (f *File) Save(name string, data func(w io.Writer, t *Tensor) error) (err error) {
	const op = "gguf.Save"
	file, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*.part")
	if err != nil {
		return sandbox.E(op, "", name, err)
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
			err = sandbox.E(op, "", name, err)
		}
	}()
	if err := f.Encode(file, data); err != nil {
		return err
	}
	if err := file.Chmod(0o644); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}

func (f *File) header() []byte {
	var b bytes.Buffer
	b.WriteString(magic)
	put(&b, f.Version)
	put(&b, uint64(len(f.Tensors)))
	put(&b, uint64(f.Meta.Len()))
	for key, v := range f.Meta.All() {
		putString(&b, key)
		putValue(&b, v)
	}
	for i := range f.Tensors {
		t := &f.Tensors[i]
		putString(&b, t.Name)
		put(&b, uint32(len(t.Dims)))
		put(&b, t.Dims)
		put(&b, uint32(t.Type))
		put(&b, uint64(t.Offset-f.DataStart))
	}
	return b.Bytes()
}

func putValue(b *bytes.Buffer, value any) {
	k := kindOf(value)
	switch v := value.(type) {
	case string:
		put(b, uint32(k))
		putString(b, v)
	case []string:
		put(b, [2]uint32{uint32(kindArray), uint32(k)})
		put(b, uint64(len(v)))
		for _, s := range v {
			putString(b, s)
		}
	default:
		size := binary.Size(v)
		if isSlice(v) {
			put(b, [2]uint32{uint32(kindArray), uint32(k)})
			put(b, uint64(size/k.bytes()))
		} else {
			put(b, uint32(k))
		}
		put(b, v)
	}
}

func isSlice(value any) bool {
	switch value.(type) {
	case uint8, int8, uint16, int16, uint32, int32, uint64, int64, float32, float64, bool:
		return false
	}
	return true
}

func putString(b *bytes.Buffer, s string) {
	put(b, uint64(len(s)))
	b.WriteString(s)
}

// put writes a value of fixed size. A buffer does not fail, and kindOf has
// let only such values in.
func put(b *bytes.Buffer, v any) { _ = binary.Write(b, binary.LittleEndian, v) }

// A countingWriter knows how many bytes went through.
type countingWriter struct {
	w *bufio.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// pad writes zeros up to a place.
func (c *countingWriter) pad(to int64) error {
	_, err := c.Write(make([]byte, max(0, to-c.n)))
	return err
}
