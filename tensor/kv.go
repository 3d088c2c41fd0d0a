package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
)

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

// keys returns the keys of a head's first n tokens, [n][HeadDim], and rows more up to a multiple of 16.
func (s KVShape) keys(page []byte, head, n int) Matrix {
	rows := (n + Lanes - 1) / Lanes * Lanes
	return Matrix{Type: s.Type, Rows: rows, Cols: s.HeadDim, data: page[head*2*s.half():][:s.half()], stride: s.place(Lanes, 0, s.HeadDim)}
}

// values returns the values of a head's first n tokens, [HeadDim][n], and columns more up to a multiple of 2.
func (s KVShape) values(page []byte, head, n int) Matrix {
	cols := (n + 1) / 2 * 2
	return Matrix{Type: s.Type, Rows: s.HeadDim, Cols: cols, data: page[(head*2+1)*s.half():][:s.half()], stride: s.place(Lanes, 0, s.PageLen)}
}

// Store writes the key and value of one token, each [Heads][HeadDim], at slot 0 to PageLen-1.
func (s KVShape) Store(page []byte, slot int, k, v []float32) {
	for h := range s.Heads {
		head := page[h*2*s.half():]
		keys, values := s.place(slot, 0, s.HeadDim), s.place(0, slot, s.PageLen)
		nextKey, nextValues := s.place(0, s.pair(), 0), s.place(Lanes, 0, s.PageLen)
		size := s.Type.Bytes(1)
		for i := range s.HeadDim {
			key := head[keys+i/s.pair()*nextKey+i%s.pair()*size:]
			value := head[s.half()+values+i/Lanes*nextValues+i%Lanes*s.pair()*size:]
			a, b := k[h*s.HeadDim+i], v[h*s.HeadDim+i]
			switch s.Type {
			case F32:
				binary.LittleEndian.PutUint32(key, math.Float32bits(a))
				binary.LittleEndian.PutUint32(value, math.Float32bits(b))
			case F16:
				putHalf(key, a)
				putHalf(value, b)
			default:
				binary.LittleEndian.PutUint16(key, ToBF16(a))
				binary.LittleEndian.PutUint16(value, ToBF16(b))
			}
		}
	}
}

// pair is how many columns a lane of the packed layout holds.
func (s KVShape) pair() int { return formats[s.Type].len }

// place is where row and column of a packed matrix of cols columns lie, in bytes.
func (s KVShape) place(row, col, cols int) int {
	size, pair := s.Type.Bytes(1), s.pair()
	return (row/Lanes*Lanes*cols + col/pair*pair*Lanes + row%Lanes*pair + col%pair) * size
}

// Load reads what Store wrote, as it was rounded.
func (s KVShape) Load(page []byte, slot int, k, v []float32) {
	decode, size := decoders[s.Type], s.Type.Bytes(1)
	for h := range s.Heads {
		head := page[h*2*s.half():]
		for i := range s.HeadDim {
			key, value := head[s.place(slot, i, s.HeadDim):], head[s.half()+s.place(i, slot, s.PageLen):]
			decode(k[h*s.HeadDim+i:][:1], key[:size])
			decode(v[h*s.HeadDim+i:][:1], value[:size])
		}
	}
}
