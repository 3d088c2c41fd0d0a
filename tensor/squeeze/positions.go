package squeeze

import (
	"encoding/binary"
	"math"
	mathbits "math/bits"
)

// largest returns the positions of the k values of the largest magnitude, in order; of equal ones, the first. It takes time
// linear in the number of values, whatever they are: magnitudes are counted by the upper, then by the lower half of
// their bits.
func largest(x []float32, k int) []int32 {
	threshold, equal := cut(x, k)
	at := make([]int32, 0, k)
	for i, v := range x {
		switch m := magnitude(v); {
		case m > threshold:
			at = append(at, int32(i))
		case m == threshold && equal > 0:
			equal--
			at = append(at, int32(i))
		}
	}
	return at
}

// cut returns the k-th largest magnitude and how many of those that equal it are among the k.
func cut(x []float32, k int) (threshold uint32, equal int) {
	counts := make([]int, 1<<16)
	for _, v := range x {
		counts[magnitude(v)>>16]++
	}
	upper, left := descend(counts, k)
	clear(counts)
	for _, v := range x {
		if m := magnitude(v); m>>16 == upper {
			counts[m&0xffff]++
		}
	}
	lower, left := descend(counts, left)
	return upper<<16 | lower, left
}

// descend returns the class, from the highest, that has the k-th member, and how many of its members are among the k.
func descend(counts []int, k int) (class uint32, left int) {
	for i := len(counts) - 1; i > 0; i-- {
		if counts[i] >= k {
			return uint32(i), k
		}
		k -= counts[i]
	}
	return 0, k
}

// magnitude orders finite floats by their absolute values.
func magnitude(v float32) uint32 { return math.Float32bits(v) &^ (1 << 31) }

// appendPositions writes positions among n in the shorter way, and returns its kind.
func appendPositions(dst []byte, at []int32, n int) ([]byte, byte) {
	start, last := len(dst), int32(-1)
	for _, i := range at {
		dst = binary.AppendUvarint(dst, uint64(i-last))
		last = i
	}
	size := (n + 7) / 8
	if len(dst)-start <= size {
		return dst, gaps
	}
	dst = append(dst[:start], make([]byte, size)...)
	for _, i := range at {
		dst[start+int(i)/8] |= 1 << (i % 8)
	}
	return dst, bits
}

// positions reads k positions among n, and returns what follows. It allocates no more than a few times the bytes it is given.
func positions(b []byte, kind byte, k, n int) (at []int32, rest []byte, err error) {
	switch kind {
	case gaps:
		if k > len(b) {
			return nil, nil, ErrCorrupt
		}
		at = make([]int32, k)
		last := -1
		for i := range at {
			gap, size := binary.Uvarint(b)
			if size <= 0 || gap == 0 || gap >= uint64(n-last) {
				return nil, nil, ErrCorrupt
			}
			last, b = last+int(gap), b[size:]
			at[i] = int32(last)
		}
		return at, b, nil
	case bits:
		size := (n + 7) / 8
		if size > len(b) {
			return nil, nil, ErrCorrupt
		}
		total := 0
		for _, c := range b[:size] {
			total += mathbits.OnesCount8(c)
		}
		if total != k || n%8 > 0 && b[size-1]>>(n%8) != 0 {
			return nil, nil, ErrCorrupt
		}
		at = make([]int32, 0, k)
		for i, c := range b[:size] {
			for ; c != 0; c &= c - 1 {
				at = append(at, int32(i*8+mathbits.TrailingZeros8(c)))
			}
		}
		return at, b[size:], nil
	}
	return nil, nil, ErrCorrupt
}
