package model

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Source is where weights come from: a GGUF file, on disk or behind an address.
// Reading blocks until the bytes are there, and is done by one goroutine at a time.
type Source struct {
	file   *gguf.File
	data   io.ReaderAt
	config Config
}

// FromGGUFData is the source of a GGUF file whose front has been read and whose
// bytes data gives. It fails as FromGGUF does.
func FromGGUFData(file *gguf.File, data io.ReaderAt) (*Source, error) {
	const op = "model.FromGGUFData"
	c, err := FromGGUF(file)
	if err != nil {
		return nil, err
	}
	s := &Source{file: file, data: data, config: c}
	if shape, ok := s.Shape("rope_freqs.weight"); ok { // Llama 3's stretching, written down by whoever made the file
		if shape.Type != tensor.F32 || shape.Rows*shape.Cols != len(c.Rope.Freq) {
			return nil, sandbox.Errorf(op, sandbox.Invalid, "rope_freqs.weight", "%d x %d of %v for %d frequencies", shape.Rows, shape.Cols, shape.Type, len(c.Rope.Freq))
		}
		b := make([]byte, 4*len(c.Rope.Freq))
		if err := s.ReadRows(b, "rope_freqs.weight", 0); err != nil {
			return nil, err
		}
		for i := range c.Rope.Freq {
			f := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
			if !(f > 0) {
				return nil, sandbox.Errorf(op, sandbox.Invalid, "rope_freqs.weight", "a factor of %v", f)
			}
			c.Rope.Freq[i] /= f
		}
	}
	return s, nil
}

// Config is the model's shape.
func (s *Source) Config() Config { return s.config }

// Shape tells what a tensor is; false when there is none.
func (s *Source) Shape(name string) (tensor.Shape, bool) {
	t := s.file.Tensor(name)
	if t == nil {
		return tensor.Shape{}, false
	}
	return tensor.Shape{Type: t.Type, Rows: t.Rows(), Cols: t.Cols()}, true
}

// offset is where a tensor lies in the file; 0 when there is none.
func (s *Source) offset(name string) int64 {
	if t := s.file.Tensor(name); t != nil {
		return t.Offset
	}
	return 0
}

// ReadRows reads rows from first on into dst, whole rows in GGUF's layout.
func (s *Source) ReadRows(dst []byte, name string, first int) error {
	t := s.file.Tensor(name)
	if t == nil || t.Rows() == 0 {
		return sandbox.Errorf("model.ReadRows", sandbox.NotFound, name, "the file has no such tensor")
	}
	from := t.Size / int64(t.Rows()) * int64(first)
	if from+int64(len(dst)) > t.Size {
		return sandbox.Errorf("model.ReadRows", sandbox.Invalid, name, "%d bytes from %d on, of %d", len(dst), from, t.Size)
	}
	if n, err := s.data.ReadAt(dst, t.Offset+from); n < len(dst) {
		return sandbox.E("model.ReadRows", "", name, fmt.Errorf("%d of %d bytes: %w", n, len(dst), err))
	}
	return nil
}
