package tensor

import (
	"fmt"
	"math"
	"strings"
)

// Int8 and Int4 are how pages may keep keys and values in little memory; files have no such types. A token's key, and its value, is
// turned by a Hadamard matrix, which spreads what a few large numbers hold over all, and then rounded with one scale for each
// head. Int8 has 255 even levels. Int4 has the sixteen that are best for normally distributed numbers (Lloyd, Max), which is what
// turned numbers nearly are. Queries are turned alike, so products stay; what values add up to is turned back at the end.
const (
	Int8 Type = 1<<16 + iota
	Int4
)

// ParseKV returns how keys and values are kept by a name such as "f16" or "int8".
func ParseKV(name string) (Type, error) {
	for _, t := range []Type{F16, BF16, Int8, Int4} {
		if strings.EqualFold(t.String(), name) {
			return t, nil
		}
	}
	return 0, fmt.Errorf("keys and values cannot be kept as %q", name)
}

// levels are the magnitudes of Int4, of which a nibble's lower three bits are the index; the fourth is the sign.
var levels = [8]float32{0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326}

// rounded tells whether tokens have scales.
func (s KVShape) rounded() bool { return s.Type == Int8 || s.Type == Int4 }

// scaleBytes is the size of one head's scales: an F16 for the key of each token, then one for its value.
func (s KVShape) scaleBytes() int {
	if !s.rounded() {
		return 0
	}
	return 2 * 2 * s.PageLen
}

// scales returns the scales of a head's keys and of its values.
func (s KVShape) scales(head []byte) (keys, values []byte) {
	b := head[2*s.half():][:s.scaleBytes()]
	return b[:len(b)/2], b[len(b)/2:]
}

// maxTurned is the most numbers that are turned together.
const maxTurned = 256

// turn multiplies x, [n][dim], by a Hadamard matrix whose rows have length 1, in blocks of the largest power of two that divides
// dim. It undoes itself.
func turn(x []float32, dim int) {
	n := min(dim&-dim, maxTurned)
	f := float32(1 / math.Sqrt(float64(n)))
	for ; len(x) > 0; x = x[n:] {
		block := x[:n]
		for half := 1; half < n; half *= 2 {
			for at := 0; at < n; at += 2 * half {
				a, b := block[at:at+half], block[at+half:at+2*half]
				for i, u := range a {
					w := b[i]
					a[i], b[i] = u+w, u-w
				}
			}
		}
		scale(best, block, f)
	}
}

// storeRounded writes a token of one head.
func (s KVShape) storeRounded(head []byte, slot int, k, v []float32) {
	var buf [maxTurned]float32
	keyScales, valueScales := s.scales(head)
	x := append(buf[:0], k...)
	turn(x, len(x))
	f := s.fit(x)
	putHalf(keyScales[2*slot:], f)
	for i, u := range x {
		s.put(head[s.place(slot, i, s.HeadDim):], i, u, f)
	}
	x = append(buf[:0], v...)
	turn(x, len(x))
	f = s.fit(x)
	putHalf(valueScales[2*slot:], f)
	values := head[s.half():]
	for i, u := range x {
		s.put(values[s.place(i, slot, s.PageLen):], slot, u, f)
	}
}

// put rounds a number of column col.
func (s KVShape) put(at []byte, col int, x, f float32) {
	if s.Type == Int8 {
		at[0] = byte(int8(nearest(x, f)))
		return
	}
	shift := col % 2 * 4
	at[0] = at[0]&^(15<<shift) | nibble(x, f)<<shift
}

// nearest is x in units of f, at most 127.
func nearest(x, f float32) float32 {
	if f == 0 {
		return 0
	}
	return float32(math.RoundToEven(float64(min(max(x/f, -127), 127))))
}

// nibble is the level nearest to x in units of f.
func nibble(x, f float32) byte {
	sign := byte(math.Float32bits(x) >> 28 & 8)
	x = float32(math.Abs(float64(x)))
	var n byte
	for i := range 7 {
		if x > f*(levels[i]+levels[i+1])/2 {
			n++
		}
	}
	return sign | n
}

// fit returns the scale that loses the least of x, as an F16 can hold it.
func (s KVShape) fit(x []float32) float32 {
	var f float32
	if s.Type == Int8 {
		for _, u := range x {
			f = max(f, float32(math.Abs(float64(u))))
		}
		return FromF16(ToF16(f / 127))
	}
	f = float32(math.Sqrt(float64(squares(best, x)) / float64(len(x))))
	// The least-squares scale for the levels that the first guess gives.
	var dot, norm float32
	for _, u := range x {
		w := levels[nibble(u, f)&7]
		dot += w * float32(math.Abs(float64(u)))
		norm += w * w
	}
	return FromF16(ToF16(dot / norm))
}

// loadRounded reads a token of one head, turned back.
func (s KVShape) loadRounded(head []byte, slot int, k, v []float32) {
	keyScales, valueScales := s.scales(head)
	keys, values := s.keys(head, 0, s.PageLen), s.values(head, 0, s.PageLen)
	row := make([]float32, max(s.HeadDim, s.PageLen))
	keys.Row(k, slot)
	scale(Scalar, k, getHalf(keyScales[2*slot:]))
	turn(k, len(k))
	for i := range s.HeadDim {
		values.Row(row, i)
		v[i] = row[slot] * getHalf(valueScales[2*slot:])
	}
	turn(v, len(v))
}

// rowRounded writes a row of Int8 or Int4 without scales.
func (m Matrix) rowRounded(dst []float32, row int) {
	group, lane := m.group(row/Lanes), row%Lanes
	for i := range m.Cols {
		if m.Type == Int8 {
			dst[i] = float32(int8(group[i*Lanes+lane]))
			continue
		}
		n := group[i/2*Lanes+lane] >> (i % 2 * 4)
		dst[i] = levels[n&7]
		if n&8 != 0 {
			dst[i] = -dst[i]
		}
	}
}
