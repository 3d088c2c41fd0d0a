// Package safetensors reads and writes safetensors, the file format in which
// weights are kept for Python: a JSON header, then tensors side by side, and for
// large models an index over several such files.
//
// Everything in a file is foreign and checked before it is used: the size of the
// header, every name, type, shape and place. Tensors must fill the file without gaps
// and without overlapping, as the format demands.
package safetensors

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/atoll-run/atoll/sandbox"
)

// The bounds of what is read.
const (
	maxHeader  = 100 << 20 // bytes, as the reference implementation has it
	maxTensors = 1 << 17
	maxDims    = 8
	maxText    = 1 << 16 // bytes of a name or of a text about the file
)

// A DType is how numbers are stored, by its name in files.
type DType string

// sizes are the types that are known, with their bytes a number.
var sizes = map[DType]int64{
	"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
	"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}

// A Tensor says what one tensor is and where it lies.
type Tensor struct {
	Name   string
	DType  DType
	Shape  []int64 // the last dimension lies together; empty for a single number
	Offset int64   // in bytes from the start of the file
	Size   int64   // in bytes
}

// Elements returns how many numbers the tensor holds.
func (t *Tensor) Elements() int64 { return t.Size / sizes[t.DType] }

// A File is what the front of a file says.
type File struct {
	Tensors []Tensor          // in the order of their places
	About   map[string]string // what the file says about itself; may be nil
}

// Decode reads the front of a file of size bytes. Errors are Invalid.
func Decode(r io.Reader, size int64) (*File, error) {
	f, err := decode(r, size)
	if err != nil {
		return nil, sandbox.E("safetensors.Decode", sandbox.Invalid, "", err)
	}
	return f, nil
}

func decode(r io.Reader, size int64) (*File, error) {
	var prefix [8]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, errors.New("the file ends inside its header")
	}
	n := binary.LittleEndian.Uint64(prefix[:])
	if n > maxHeader || int64(n) > size-8 {
		return nil, fmt.Errorf("a header of %d bytes in a file of %d: not a safetensors file, or cut off", n, size)
	}
	header := make([]byte, n)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, errors.New("the file ends inside its header")
	}
	f, err := parse(header)
	if err != nil {
		return nil, fmt.Errorf("the header: %w", err)
	}
	start := 8 + int64(n)
	for i := range f.Tensors {
		f.Tensors[i].Offset += start
	}
	return f, f.place(start, size)
}

// place checks that tensors fill the file from start to end.
func (f *File) place(start, end int64) error {
	slices.SortStableFunc(f.Tensors, func(a, b Tensor) int {
		if a.Offset != b.Offset {
			return int(min(1, max(-1, a.Offset-b.Offset)))
		}
		return int(min(1, max(-1, a.Size-b.Size))) // empty ones first
	})
	at := start
	for i := range f.Tensors {
		t := &f.Tensors[i]
		if t.Offset != at {
			return fmt.Errorf("tensor %q begins at byte %d, not at %d: there is a gap or an overlap", t.Name, t.Offset, at)
		}
		at += t.Size
	}
	if at != end {
		return fmt.Errorf("tensors end at byte %d of a file of %d: it is cut off or has more in it", at, end)
	}
	return nil
}

// parse reads the header's JSON, in which no name may stand twice.
func parse(header []byte) (*File, error) {
	d := json.NewDecoder(bytes.NewReader(header))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	f := &File{}
	seen := map[string]bool{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		name := token.(string) // the decoder lets only text be a key
		if seen[name] || len(name) > maxText || len(f.Tensors) >= maxTensors {
			return nil, fmt.Errorf("tensor %.100q stands there twice, or there are too many", name)
		}
		seen[name] = true
		if name == "__metadata__" {
			if err := d.Decode(&f.About); err != nil {
				return nil, fmt.Errorf("what the file says about itself: %w", err)
			}
			continue
		}
		var info struct {
			DType   DType    `json:"dtype"`
			Shape   []int64  `json:"shape"`
			Offsets [2]int64 `json:"data_offsets"`
		}
		if err := d.Decode(&info); err != nil {
			return nil, fmt.Errorf("tensor %q: %w", name, err)
		}
		t := Tensor{Name: name, DType: info.DType, Shape: info.Shape, Offset: info.Offsets[0], Size: info.Offsets[1] - info.Offsets[0]}
		if err := t.check(); err != nil {
			return nil, fmt.Errorf("tensor %q: %w", name, err)
		}
		f.Tensors = append(f.Tensors, t)
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if rest, _ := io.ReadAll(d.Buffered()); len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("there is more after its end")
	}
	return f, nil
}

func (t *Tensor) check() error {
	size, ok := sizes[t.DType]
	if !ok {
		return fmt.Errorf("type %q is not known", t.DType)
	}
	if len(t.Shape) > maxDims {
		return fmt.Errorf("%d dimensions are too many", len(t.Shape))
	}
	for _, n := range t.Shape {
		if n < 0 || n > 0 && size > (1<<50)/n {
			return fmt.Errorf("the shape %v makes no sense", t.Shape)
		}
		size *= n
	}
	if t.Offset < 0 || t.Offset > 1<<50 || t.Size != size {
		return fmt.Errorf("%d bytes from %d on for the shape %v of %s", t.Size, t.Offset, t.Shape, t.DType)
	}
	return nil
}

// Encode writes tensors, of which Name, DType and Shape count, in this order. data
// is called for each and writes its bytes; its error, or that of w, is returned as it
// is.
func Encode(w io.Writer, tensors []Tensor, about map[string]string, data func(w io.Writer, t *Tensor) error) error {
	const op = "safetensors.Encode"
	var header bytes.Buffer
	header.WriteByte('{')
	put := func(name string, v any) {
		if header.Len() > 1 {
			header.WriteByte(',')
		}
		key, _ := json.Marshal(name) // text and numbers can always be written
		value, _ := json.Marshal(v)
		header.Write(key)
		header.WriteByte(':')
		header.Write(value)
	}
	if len(about) > 0 {
		put("__metadata__", about)
	}
	at := int64(0)
	placed := slices.Clone(tensors)
	seen := map[string]bool{"__metadata__": true}
	for i := range placed {
		t := &placed[i]
		t.Offset, t.Size = at, sizes[t.DType]
		for _, n := range t.Shape {
			t.Size *= n
		}
		if err := t.check(); err != nil || seen[t.Name] {
			return sandbox.E(op, sandbox.Invalid, t.Name, cmpOr(err, errors.New("the name is taken")))
		}
		seen[t.Name] = true
		at += t.Size
		put(t.Name, map[string]any{"dtype": t.DType, "shape": append([]int64{}, t.Shape...), "data_offsets": []int64{t.Offset, at}})
	}
	header.WriteByte('}')
	for header.Len()%8 != 0 {
		header.WriteByte(' ') // so that tensors are aligned
	}
	if err := binary.Write(w, binary.LittleEndian, uint64(header.Len())); err != nil {
		return err
	}
	if _, err := w.Write(header.Bytes()); err != nil {
		return err
	}
	for i := range placed {
		c := &counter{w: w}
		if err := data(c, &placed[i]); err != nil {
			return err
		}
		if c.n != placed[i].Size {
			return sandbox.Errorf(op, sandbox.Internal, placed[i].Name, "%d bytes were written of %d", c.n, placed[i].Size)
		}
	}
	return nil
}

func cmpOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// A counter knows how many bytes went through.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
