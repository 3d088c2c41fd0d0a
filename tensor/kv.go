package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
)

// A KVShape says how keys and values of one layer are kept in pages of PageLen tokens. Both are packed matrices: of a page's
// keys each row is a token, of its values each column, so that attention is two products. A page holds, for each head, keys,
// then values, then for Int8 and Int4 the tokens' scales, and last what bounds the keys; see Store and Bound.
type KVShape struct {
	Type    Type // F32, F16, BF16, Int8 or Int4
	Heads   int  // key and value heads
	HeadDim int  // a multiple of 16
	PageLen int  // tokens in a page, a multiple of 16
}

// Check returns why pages of this shape cannot be, or nil.
func (s KVShape) Check() error {
	switch {
	case s.Type != F32 && s.Type != F16 && s.Type != BF16 && !s.rounded():
		return fmt.Errorf("keys and values cannot be kept as %v", s.Type)
	case s.Heads <= 0 || s.HeadDim <= 0 || s.HeadDim%Lanes != 0 || s.PageLen <= 0 || s.PageLen%Lanes != 0:
		return fmt.Errorf("%d heads of %d in pages of %d tokens: sizes must be positive multiples of %d", s.Heads, s.HeadDim, s.PageLen, Lanes)
	}
	return nil
}

// PageBytes returns the size of a page. Its memory should start on a multiple of 64 bytes.
func (s KVShape) PageBytes() int { return s.Heads * s.headBytes() }

// headBytes is the size of what a page keeps of one head.
func (s KVShape) headBytes() int { return 2*s.half() + s.scaleBytes() + s.boundBytes() }

// half is the bytes of one head's keys, or values.
func (s KVShape) half() int { return s.bits() * s.HeadDim * s.PageLen / 8 }

// bits is the size of a number.
func (s KVShape) bits() int {
	switch s.Type {
	case Int4:
		return 4
	case Int8:
		return 8
	}
	return 8 * s.Type.Bytes(1)
}

// head is what a page keeps of one head.
func (s KVShape) head(page []byte, head int) []byte {
	return page[head*s.headBytes():][:s.headBytes()]
}

// keys returns the keys of a head's first n tokens, [n][HeadDim], and rows more up to a multiple of 16.
func (s KVShape) keys(page []byte, head, n int) Matrix {
	rows := (n + Lanes - 1) / Lanes * Lanes
	return Matrix{Type: s.Type, Rows: rows, Cols: s.HeadDim, data: s.head(page, head)[:s.half()], stride: s.bits() * Lanes * s.HeadDim / 8}
}

// values returns the values of a head's first n tokens, [HeadDim][n], and columns more up to a multiple of 2.
func (s KVShape) values(page []byte, head, n int) Matrix {
	cols := (n + 1) / 2 * 2
	return Matrix{Type: s.Type, Rows: s.HeadDim, Cols: cols, data: s.head(page, head)[s.half():][:s.half()], stride: s.bits() * Lanes * s.PageLen / 8}
}

// Store writes the keys and values of consecutive tokens, each [tokens][Heads][HeadDim], from a slot of 0 to PageLen-1 on. The
// tokens before them must have been written, those after are forgotten. A page is written by one thread at a time.
func (s KVShape) Store(page []byte, slot int, k, v []float32) {
	width := s.Heads * s.HeadDim
	for ; len(k) > 0; k, v, slot = k[width:], v[width:], slot+1 {
		for h := range s.Heads {
			head, key, value := s.head(page, h), k[h*s.HeadDim:][:s.HeadDim], v[h*s.HeadDim:][:s.HeadDim]
			s.widen(head, slot, key)
			if s.rounded() {
				s.storeRounded(head, slot, key, value)
			} else {
				s.store(head, slot, key, value)
			}
		}
	}
}

// store writes a token of one head as floating-point numbers.
func (s KVShape) store(head []byte, slot int, k, v []float32) {
	keys, values := s.place(slot, 0, s.HeadDim), s.half()+s.place(0, slot, s.PageLen)
	nextKey, nextValues := s.place(0, s.pair(), 0), s.place(Lanes, 0, s.PageLen)
	size := s.Type.Bytes(1)
	for i := range s.HeadDim {
		key := head[keys+i/s.pair()*nextKey+i%s.pair()*size:]
		value := head[values+i/Lanes*nextValues+i%Lanes*s.pair()*size:]
		switch s.Type {
		case F32:
			binary.LittleEndian.PutUint32(key, math.Float32bits(k[i]))
			binary.LittleEndian.PutUint32(value, math.Float32bits(v[i]))
		case F16:
			putHalf(key, k[i])
			putHalf(value, v[i])
		default:
			binary.LittleEndian.PutUint16(key, ToBF16(k[i]))
			binary.LittleEndian.PutUint16(value, ToBF16(v[i]))
		}
	}
}

// pair is how many columns a lane of the packed layout holds.
func (s KVShape) pair() int {
	if s.rounded() {
		return 8 / s.bits()
	}
	return formats[s.Type].len
}

// place is where row and column of a packed matrix of cols columns lie, in bytes.
func (s KVShape) place(row, col, cols int) int {
	pair := s.pair()
	return (row/Lanes*Lanes*cols + col/pair*pair*Lanes + row%Lanes*pair + col%pair) * s.bits() / 8
}

// Load reads what Store wrote, as it was rounded.
func (s KVShape) Load(page []byte, slot int, k, v []float32) {
	for h := range s.Heads {
		head, key, value := s.head(page, h), k[h*s.HeadDim:][:s.HeadDim], v[h*s.HeadDim:][:s.HeadDim]
		if s.rounded() {
			s.loadRounded(head, slot, key, value)
			continue
		}
		decode, size := decoders[s.Type], s.Type.Bytes(1)
		for i := range s.HeadDim {
			decode(key[i:][:1], head[s.place(slot, i, s.HeadDim):][:size])
			decode(value[i:][:1], head[s.half()+s.place(i, slot, s.PageLen):][:size])
		}
	}
}
