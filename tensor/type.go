package tensor

import "fmt"

// A Type says how numbers are stored. The values are those of GGUF files.
type Type uint32

const (
	F32    Type = 0
	F16    Type = 1
	Q4_0   Type = 2
	Q4_1   Type = 3
	Q5_0   Type = 6
	Q5_1   Type = 7
	Q8_0   Type = 8
	Q2_K   Type = 10
	Q3_K   Type = 11
	Q4_K   Type = 12
	Q5_K   Type = 13
	Q6_K   Type = 14
	IQ4_NL Type = 20
	IQ4_XS Type = 23
	BF16   Type = 30

	// Types of our own, which other programs refuse: 3 bits as Q4_0 and Q4_1 have 4, and 8-bit floats.
	Q3_0    Type = 41001
	Q3_1    Type = 41002
	F8_E4M3 Type = 41003
	F8_E5M2 Type = 41004
)

// A format is what there is to know about a Type. A block holds len numbers in the bytes of all its pieces. Pieces are runs
// of 1, 2 or 4 bytes that a packed matrix keeps together for each row; see Matrix.
type format struct {
	name   string
	len    int
	pieces []int  // bytes of each piece
	bytes  int    // their sum
	signed int    // pieces from here on are signed bytes, packed with 128 added
	sums   summed // which sums of activations its kernels take; none if not quantised
}

var formats = func() map[Type]*format {
	m := map[Type]*format{
		F32:     {name: "F32", len: 1, pieces: run(4, 1)},
		F16:     {name: "F16", len: 1, pieces: run(2, 1)},
		BF16:    {name: "BF16", len: 2, pieces: run(4, 1)}, // two columns, so that a lane of 32 bits is one row's
		F8_E4M3: {name: "F8_E4M3", len: 64, pieces: join(run(4, 1), run(1, 64))},
		F8_E5M2: {name: "F8_E5M2", len: 64, pieces: join(run(4, 1), run(1, 64))},
		Q3_0:    {name: "Q3_0", len: 32, pieces: join(run(2, 1), run(4, 3)), sums: summed{4, 1}},
		Q3_1:    {name: "Q3_1", len: 32, pieces: join(run(2, 2), run(4, 3)), sums: summed{0, 1}},
		Q4_0:    {name: "Q4_0", len: 32, pieces: join(run(2, 1), run(4, 4)), sums: summed{8, 1}},
		Q4_1:    {name: "Q4_1", len: 32, pieces: join(run(2, 2), run(4, 4)), sums: summed{0, 1}},
		Q5_0:    {name: "Q5_0", len: 32, pieces: join(run(2, 1), run(4, 5)), sums: summed{16, 1}},
		Q5_1:    {name: "Q5_1", len: 32, pieces: join(run(2, 2), run(4, 5)), sums: summed{0, 1}},
		Q8_0:    {name: "Q8_0", len: 32, pieces: join(run(2, 1), run(4, 8)), signed: 1, sums: summed{128, 1}},
		Q2_K:    {name: "Q2_K", len: 256, pieces: join(run(4, 20), run(2, 2)), sums: summed{0, 2}},
		Q3_K:    {name: "Q3_K", len: 256, pieces: join(run(4, 27), run(2, 1)), sums: summed{4, 2}},
		Q4_K:    {name: "Q4_K", len: 256, pieces: join(run(2, 2), run(4, 35)), sums: summed{0, 1}},
		Q5_K:    {name: "Q5_K", len: 256, pieces: join(run(2, 2), run(4, 43)), sums: summed{0, 1}},
		Q6_K:    {name: "Q6_K", len: 256, pieces: join(run(4, 52), run(2, 1)), sums: summed{32, 2}},
		IQ4_NL:  {name: "IQ4_NL", len: 32, pieces: join(run(2, 1), run(4, 4)), sums: summed{128, 1}},
		IQ4_XS:  {name: "IQ4_XS", len: 256, pieces: join(run(2, 2), run(4, 33)), sums: summed{128, 1}},
	}
	for _, f := range m {
		if f.signed == 0 {
			f.signed = len(f.pieces)
		}
		for _, n := range f.pieces {
			f.bytes += n
		}
	}
	return m
}()

// run is n pieces of size bytes.
func run(size, n int) []int {
	p := make([]int, n)
	for i := range p {
		p[i] = size
	}
	return p
}

func join(a, b []int) []int { return append(a, b...) }

// ParseType returns the Type of a name such as "Q4_K".
func ParseType(name string) (Type, error) {
	for t, f := range formats {
		if f.name == name {
			return t, nil
		}
	}
	return 0, fmt.Errorf("tensor type %q is not known", name)
}

// String returns the name that GGUF's users know, or the number of a type that is not known here.
func (t Type) String() string {
	switch t {
	case Int8:
		return "INT8"
	case Int4:
		return "INT4"
	}
	if f := formats[t]; f != nil {
		return f.name
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// Known tells whether this package can read the type. The other methods need that.
func (t Type) Known() bool { return formats[t] != nil }

// BlockLen returns how many numbers a block has in the files: 1, 32 or 256.
func (t Type) BlockLen() int {
	if t == BF16 {
		return 1
	}
	return formats[t].len
}

// BlockBytes returns the size of a block.
func (t Type) BlockBytes() int {
	if t == BF16 {
		return 2
	}
	return formats[t].bytes
}

// Bytes returns the size of n numbers, n a multiple of BlockLen.
func (t Type) Bytes(n int) int { return n / t.BlockLen() * t.BlockBytes() }

// Quantised tells whether numbers are whole and share scales, so that products with them use activations rounded to int8.
func (t Type) Quantised() bool { return formats[t].sums.parts > 0 }
