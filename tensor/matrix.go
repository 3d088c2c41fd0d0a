package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Lanes is how many rows a packed matrix interleaves: one for each 32-bit lane of a 512-bit register. Rows are cut at
// multiples of it.
const Lanes = 16

// A Matrix is weights of a linear layer, [Rows][Cols], in the order in which they are computed with; the zero Matrix has
// no weights. It may be part of a larger one: parts share memory, so that heads or columns are given to other threads or other
// machines without writing anything again.
//
// The layout has the bytes of GGUF's blocks, with the same block of 16 rows together: every piece of a block (a scale, 4 bytes of
// numbers) is followed by that piece of the next row. Products then keep one row in each lane and never add across lanes.
type Matrix struct {
	Type       Type
	Rows, Cols int

	data   []byte // from the first group of rows to the end of the last
	stride int    // bytes from one group of 16 rows to the next
}

// A Shape says which type and size a Matrix is to have.
type Shape struct {
	Type       Type
	Rows, Cols int
}

// Bytes returns the size of the packed matrix. It fails for types that are not known and columns that are not whole blocks.
func (s Shape) Bytes() (int, error) {
	if !s.Type.Known() {
		return 0, fmt.Errorf("%v is not known", s.Type)
	}
	f := formats[s.Type]
	if s.Rows <= 0 || s.Cols <= 0 || s.Cols%f.len != 0 {
		return 0, fmt.Errorf("a matrix of %d x %d cannot be packed as %v, whose blocks have %d columns", s.Rows, s.Cols, s.Type, f.len)
	}
	groups, blocks := (s.Rows+Lanes-1)/Lanes, s.Cols/f.len
	if groups > math.MaxInt/(blocks*f.bytes*Lanes) {
		return 0, errors.New("matrix is too large")
	}
	return groups * blocks * f.bytes * Lanes, nil
}

// NewMatrix returns the matrix that data holds in the packed layout, or will hold once PackRows has been called for all rows.
// data is kept; it should start on a multiple of 64 bytes, as Alloc's does. It fails unless data has the shape's size.
func NewMatrix(s Shape, data []byte) (Matrix, error) {
	n, err := s.Bytes()
	if err != nil {
		return Matrix{}, err
	}
	if len(data) != n {
		return Matrix{}, fmt.Errorf("packed %v of %d x %d has %d bytes, not %d", s.Type, s.Rows, s.Cols, n, len(data))
	}
	f := formats[s.Type]
	return Matrix{Type: s.Type, Rows: s.Rows, Cols: s.Cols, data: data, stride: s.Cols / f.len * f.bytes * Lanes}, nil
}

// PackRows fills rows from first on with src, in GGUF's layout: whole rows of m.Cols numbers. first must be a multiple of Lanes.
// Different rows may be filled at the same time, but only whole groups of Lanes rows.
func (m Matrix) PackRows(first int, src []byte) error {
	row := m.Type.Bytes(m.Cols)
	n := len(src) / row
	if first < 0 || first%Lanes != 0 || first+n > m.Rows || n*row != len(src) {
		return fmt.Errorf("%d bytes cannot be rows from %d on of %v %d x %d", len(src), first, m.Type, m.Rows, m.Cols)
	}
	f := formats[m.Type]
	for r := range n {
		group, lane := m.group((first+r)/Lanes), (first+r)%Lanes
		for b := range m.Cols / f.len {
			f.spread(group[b*f.bytes*Lanes:], lane, src[r*row+b*f.bytes:])
		}
	}
	return nil
}

// Pack makes a matrix of src, whole rows in GGUF's layout, in data, which must have the size that Shape.Bytes says.
func Pack(s Shape, data, src []byte) (Matrix, error) {
	m, err := NewMatrix(s, data)
	if err != nil {
		return Matrix{}, err
	}
	if len(src) != s.Rows*s.Type.Bytes(s.Cols) {
		return Matrix{}, fmt.Errorf("%d x %d of %v has %d bytes, not %d", s.Rows, s.Cols, s.Type, s.Rows*s.Type.Bytes(s.Cols), len(src))
	}
	return m, m.PackRows(0, src)
}

// SliceRows returns rows lo to hi, of which lo must be a multiple of Lanes.
func (m Matrix) SliceRows(lo, hi int) Matrix {
	if lo < 0 || lo > hi || hi > m.Rows || lo%Lanes != 0 {
		panic(fmt.Sprintf("rows %d to %d of %d", lo, hi, m.Rows)) // as an index out of range
	}
	m.data = m.data[lo/Lanes*m.stride:]
	m.Rows = hi - lo
	return m
}

// SliceCols returns columns lo to hi, both multiples of ColAlign.
func (m Matrix) SliceCols(lo, hi int) Matrix {
	f := formats[m.Type]
	if lo < 0 || lo > hi || hi > m.Cols || lo%f.len != 0 || hi%f.len != 0 {
		panic(fmt.Sprintf("columns %d to %d of %d", lo, hi, m.Cols)) // as an index out of range
	}
	m.data = m.data[lo/f.len*f.bytes*Lanes:]
	m.Cols = hi - lo
	return m
}

// ColAlign is what columns must be cut at multiples of: the block of the type.
func (m Matrix) ColAlign() int { return formats[m.Type].len }

// Bytes returns how many bytes of weights a product with the matrix reads.
func (m Matrix) Bytes() int {
	f := formats[m.Type]
	return (m.Rows + Lanes - 1) / Lanes * (m.Cols / f.len) * f.bytes * Lanes
}

// Row writes one row as numbers: an embedding.
func (m Matrix) Row(dst []float32, row int) {
	if m.Type == Int8 || m.Type == Int4 {
		m.rowRounded(dst, row)
		return
	}
	f := formats[m.Type]
	group, block := m.group(row/Lanes), make([]byte, f.bytes)
	decode := decoders[m.Type]
	for b := range m.Cols / f.len {
		f.gather(block, group[b*f.bytes*Lanes:], row%Lanes)
		if m.Type == BF16 { // the one type whose packed block is two of the file's
			decode(dst[b*2:], block)
			decode(dst[b*2+1:], block[2:])
			continue
		}
		decode(dst[b*f.len:(b+1)*f.len], block)
	}
}

// group returns the packed rows 16g to 16g+15.
func (m Matrix) group(g int) []byte { return m.data[g*m.stride:] }

// spread writes the block src of one row into a packed group.
func (f *format) spread(group []byte, lane int, src []byte) {
	at := 0
	for i, n := range f.pieces {
		dst := group[at*Lanes+lane*n:]
		switch {
		case n < 4:
			copy(dst[:n], src[at:at+n])
		case i >= f.signed:
			binary.LittleEndian.PutUint32(dst, binary.LittleEndian.Uint32(src[at:])^0x80808080)
		default:
			binary.LittleEndian.PutUint32(dst, binary.LittleEndian.Uint32(src[at:]))
		}
		at += n
	}
}

// gather reads the block of one row out of a packed group.
func (f *format) gather(block, group []byte, lane int) {
	at := 0
	for i, n := range f.pieces {
		src := group[at*Lanes+lane*n:]
		switch {
		case n < 4:
			copy(block[at:at+n], src)
		case i >= f.signed:
			binary.LittleEndian.PutUint32(block[at:], binary.LittleEndian.Uint32(src)^0x80808080)
		default:
			binary.LittleEndian.PutUint32(block[at:], binary.LittleEndian.Uint32(src))
		}
		at += n
	}
}
