package tensor

import "fmt"

// A KVShape says how keys and values of one layer are kept in pages of PageLen tokens. Both are packed matrices: of a page's
// keys each row is a token, of its values each column, so that attention is two products. A page holds, for each head, keys
// and then values.
type KVShape struct {
	Type    Type // F32, F16 or BF16
	Heads   int  // key and value heads
	HeadDim int  // a multiple of 16
	PageLen int  // tokens in a page, a multiple of 16
}

// Check returns why pages of this shape cannot be, or nil.
func (s KVShape) Check() error {
	switch {
	case s.Type != F32 && s.Type != F16 && s.Type != BF16:
		return fmt.Errorf("keys and values cannot be kept as %v", s.Type)
	case s.Heads <= 0 || s.HeadDim <= 0 || s.HeadDim%Lanes != 0 || s.PageLen <= 0 || s.PageLen%Lanes != 0:
		return fmt.Errorf("%d heads of %d in pages of %d tokens: sizes must be positive multiples of %d", s.Heads, s.HeadDim, s.PageLen, Lanes)
	}
	return nil
}

// PageBytes returns the size of a page. Its memory should start on a multiple of 64 bytes.
func (s KVShape) PageBytes() int { return s.Heads * 2 * s.half() }

// half is the bytes of one head's keys, or values.
func (s KVShape) half() int { return s.Type.Bytes(s.HeadDim * s.PageLen) }

// keys returns the keys of a head, [PageLen][HeadDim], values its values, [HeadDim][PageLen].
func (s KVShape) keys(page []byte, head int) Matrix {
	f := formats[s.Type]
	return Matrix{Type: s.Type, Rows: s.PageLen, Cols: s.HeadDim, data: page[head*2*s.half():][:s.half()], stride: s.HeadDim / f.len * f.bytes * Lanes}
}

func (s KVShape) values(page []byte, head int) Matrix {
	f := formats[s.Type]
	return Matrix{Type: s.Type, Rows: s.HeadDim, Cols: s.PageLen, data: page[(head*2+1)*s.half():][:s.half()], stride: s.PageLen / f.len * f.bytes * Lanes}
}

// Store writes the key and value of one token, each [Heads][HeadDim], at slot 0 to PageLen-1.
func (s KVShape) Store(page []byte, slot int, k, v []float32) {
	for h := range s.Heads {
		keys, values := s.keys(page, h), s.values(page, h)
		for i := range s.HeadDim {
			keys.set(slot, i, k[h*s.HeadDim+i])
			values.set(i, slot, v[h*s.HeadDim+i])
		}
	}
}

// Load reads what Store wrote, as it was rounded.
func (s KVShape) Load(page []byte, slot int, k, v []float32) {
	for h := range s.Heads {
		keys, values := s.keys(page, h), s.values(page, h)
		for i := range s.HeadDim {
			k[h*s.HeadDim+i] = keys.at(slot, i)
			v[h*s.HeadDim+i] = values.at(i, slot)
		}
	}
}

// set writes one number of a matrix that is not quantised.
func (m Matrix) set(row, col int, f float32) {
	at := m.offset(row, col)
	encoders[m.Type](m.data[at:at+m.Type.BlockBytes()], []float32{f})
}

func (m Matrix) at(row, col int) float32 {
	var f [1]float32
	at := m.offset(row, col)
	decoders[m.Type](f[:], m.data[at:at+m.Type.BlockBytes()])
	return f[0]
}

// offset is where a number of a matrix that is not quantised lies.
func (m Matrix) offset(row, col int) int {
	f := formats[m.Type]
	size := f.bytes / f.len
	return row/Lanes*m.stride + col/f.len*f.bytes*Lanes + row%Lanes*f.bytes + col%f.len*size
}
