package gguf

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"unsafe"

	"github.com/atoll-run/atoll/sandbox"
)

// Decode reads the front of a file: all that comes before the tensors' data.
// size is the length of the whole file in bytes, against which everything is
// checked, or -1 when it is not known. r is read in pieces and may be ahead of
// DataStart by up to 64 KB afterwards. Errors are Invalid.
func Decode(r io.Reader, size int64) (*File, error) {
	d := decoder{r: bufio.NewReaderSize(r, 1<<16), left: maxHeader}
	if size >= 0 {
		d.left = min(size, maxHeader)
	}
	f, err := d.file(size)
	if err != nil {
		return nil, sandbox.E("gguf.Decode", sandbox.Invalid, "", err)
	}
	return f, nil
}

// A decoder reads the parts of a header. left is how many bytes may still come.
type decoder struct {
	r    *bufio.Reader
	left int64
	read int64
	buf  [8]byte
}

func (d *decoder) file(size int64) (*File, error) {
	f := &File{Alignment: defaultAlignment}
	if err := d.full(d.buf[:4]); err != nil {
		return nil, err
	}
	if string(d.buf[:4]) != magic {
		return nil, errors.New("not a GGUF file")
	}
	var err error
	if f.Version, err = d.u32(); err != nil {
		return nil, err
	}
	if f.Version < versionOldest || f.Version > versionNow {
		if v := bits.ReverseBytes32(f.Version); v >= versionOldest && v <= versionNow {
			return nil, errors.New("the file is big-endian, which is not supported")
		}
		return nil, fmt.Errorf("GGUF version %d is not supported, only %d to %d", f.Version, versionOldest, versionNow)
	}
	// A tensor record takes 24 bytes or more, a pair of metadata 13.
	tensors, err := d.count("tensors", maxTensors, 24)
	if err != nil {
		return nil, err
	}
	keys, err := d.count("metadata keys", maxKeys, 13)
	if err != nil {
		return nil, err
	}
	for range keys {
		if err := d.pair(&f.Meta); err != nil {
			return nil, err
		}
	}
	if v := f.Meta.Get(KeyAlignment); v != nil {
		a, ok := f.Meta.Int(KeyAlignment)
		if !ok || a < 1 || a > maxAlignment || a&(a-1) != 0 {
			return nil, fmt.Errorf("an alignment of %v makes no sense", v)
		}
		f.Alignment = a
	}
	for range tensors {
		t, err := d.tensor(f.Alignment)
		if err != nil {
			return nil, err
		}
		f.Tensors = append(f.Tensors, t)
	}
	f.DataStart = align(d.read, f.Alignment)
	for i := range f.Tensors {
		f.Tensors[i].Offset += f.DataStart
	}
	return f, f.place(size)
}

func (d *decoder) pair(m *Meta) error {
	key, err := d.str(maxKey)
	if err != nil {
		return fmt.Errorf("a metadata key: %w", err)
	}
	if _, ok := m.values[key]; ok {
		return fmt.Errorf("metadata %q stands there twice", key)
	}
	value, err := d.value()
	if err != nil {
		return fmt.Errorf("metadata %q: %w", key, err)
	}
	return m.Set(key, value)
}

func (d *decoder) tensor(alignment int64) (t Tensor, err error) {
	if t.Name, err = d.str(maxName); err != nil {
		return t, fmt.Errorf("a tensor's name: %w", err)
	}
	if err := d.tensorBody(&t, alignment); err != nil {
		return t, fmt.Errorf("tensor %q: %w", t.Name, err)
	}
	return t, nil
}

func (d *decoder) tensorBody(t *Tensor, alignment int64) error {
	n, err := d.u32()
	if err != nil {
		return err
	}
	if n < 1 || n > maxDims {
		return fmt.Errorf("%d dimensions, want 1 to %d", n, maxDims)
	}
	t.Dims = make([]int64, n)
	for i := range t.Dims {
		v, err := d.u64()
		if err != nil {
			return err
		}
		t.Dims[i] = int64(v) // what overflows becomes negative, which size refuses
	}
	typ, err := d.u32()
	if err != nil {
		return err
	}
	t.Type = Type(typ)
	if t.Size, err = size(t.Type, t.Dims); err != nil {
		return err
	}
	offset, err := d.u64()
	if err != nil {
		return err
	}
	if offset > 1<<52 || int64(offset)%alignment != 0 {
		return fmt.Errorf("offset %d is not aligned to %d or makes no sense", offset, alignment)
	}
	t.Offset = int64(offset)
	return nil
}

// value reads a value with its kind before it.
func (d *decoder) value() (any, error) {
	k, err := d.u32()
	if err != nil {
		return nil, err
	}
	if kind(k) != kindArray {
		v, err := d.array(kind(k), 1)
		if err != nil {
			return nil, err
		}
		return first(v), nil
	}
	if k, err = d.u32(); err != nil {
		return nil, err
	}
	least := int64(kind(k).bytes())
	if kind(k) == kindString {
		least = 8
	}
	if least == 0 {
		return nil, fmt.Errorf("an array of kind %d is not supported", k)
	}
	n, err := d.count("array elements", maxArray, least)
	if err != nil {
		return nil, err
	}
	return d.array(kind(k), n)
}

// array reads n values of a kind into a slice.
func (d *decoder) array(k kind, n int) (any, error) {
	switch k {
	case kindUint8:
		return numbers[uint8](d, n)
	case kindInt8:
		return numbers[int8](d, n)
	case kindUint16:
		return numbers[uint16](d, n)
	case kindInt16:
		return numbers[int16](d, n)
	case kindUint32:
		return numbers[uint32](d, n)
	case kindInt32:
		return numbers[int32](d, n)
	case kindUint64:
		return numbers[uint64](d, n)
	case kindInt64:
		return numbers[int64](d, n)
	case kindFloat32:
		return numbers[float32](d, n)
	case kindFloat64:
		return numbers[float64](d, n)
	case kindBool:
		raw, err := numbers[uint8](d, n)
		out := make([]bool, len(raw))
		for i, b := range raw {
			out[i] = b != 0
		}
		return out, err
	case kindString:
		return d.strs(n)
	}
	return nil, fmt.Errorf("a value of kind %d is not supported", k)
}

// numbers reads n numbers. It grows in steps, so that a count that lies costs
// no more memory than the bytes that are there.
func numbers[T number](d *decoder, n int) ([]T, error) {
	const step = 1 << 16
	var zero T
	width := int(unsafe.Sizeof(zero))
	out := make([]T, 0, min(n, step))
	raw := make([]byte, min(n, step)*width)
	for len(out) < n {
		m := min(step, n-len(out))
		if err := d.full(raw[:m*width]); err != nil {
			return nil, err
		}
		out = append(out, make([]T, m)...)
		if _, err := binary.Decode(raw[:m*width], binary.LittleEndian, out[len(out)-m:]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// strs reads n strings, which share one piece of memory.
func (d *decoder) strs(n int) ([]string, error) {
	ends := make([]int, 0, min(n, 1<<16))
	var all []byte
	for range n {
		m, err := d.count("bytes of a string", maxString, 1)
		if err != nil {
			return nil, err
		}
		if all, err = d.grow(all, m); err != nil {
			return nil, err
		}
		ends = append(ends, len(all))
	}
	text, from := string(all), 0
	out := make([]string, n)
	for i, end := range ends {
		out[i], from = text[from:end], end
	}
	return out, nil
}

func (d *decoder) str(limit int) (string, error) {
	n, err := d.count("bytes of a string", limit, 1)
	if err != nil {
		return "", err
	}
	b, err := d.grow(nil, n)
	return string(b), err
}

// grow appends n bytes from the file to b.
func (d *decoder) grow(b []byte, n int) ([]byte, error) {
	for n > 0 {
		m := min(n, 1<<16)
		b = append(b, make([]byte, m)...)
		if err := d.full(b[len(b)-m:]); err != nil {
			return b, err
		}
		n -= m
	}
	return b, nil
}

// count reads a count of things that take at least so many bytes each, and
// refuses one that is over the limit or that the rest cannot hold.
func (d *decoder) count(what string, limit int, least int64) (int, error) {
	n, err := d.u64()
	if err != nil {
		return 0, err
	}
	if n > uint64(limit) {
		return 0, fmt.Errorf("%d %s, more than the limit of %d", n, what, limit)
	}
	if int64(n) > d.left/least {
		return 0, fmt.Errorf("%d %s, more than the %d bytes left can hold: the file is cut off", n, what, d.left)
	}
	return int(n), nil
}

func (d *decoder) u32() (uint32, error) {
	err := d.full(d.buf[:4])
	return binary.LittleEndian.Uint32(d.buf[:4]), err
}

func (d *decoder) u64() (uint64, error) {
	err := d.full(d.buf[:8])
	return binary.LittleEndian.Uint64(d.buf[:8]), err
}

func (d *decoder) full(b []byte) error {
	if int64(len(b)) > d.left {
		return errors.New("the file ends inside its header")
	}
	n, err := io.ReadFull(d.r, b)
	d.left -= int64(n)
	d.read += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the file ends inside its header")
	}
	return err
}
