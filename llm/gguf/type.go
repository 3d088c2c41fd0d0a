package gguf

import (
	"fmt"
	"strings"
)

// A Type is how the numbers of a tensor are stored. Its values are those in files.
type Type uint32

// The types that are known.
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
	I8     Type = 24
	I16    Type = 25
	I32    Type = 26
	I64    Type = 27
	F64    Type = 28
	BF16   Type = 30
)

// block is how many numbers a type stores together, and in how many bytes.
type block struct {
	name       string
	len, bytes int
}

var blocks = map[Type]block{
	F32: {"F32", 1, 4}, F16: {"F16", 1, 2}, BF16: {"BF16", 1, 2}, F64: {"F64", 1, 8},
	I8: {"I8", 1, 1}, I16: {"I16", 1, 2}, I32: {"I32", 1, 4}, I64: {"I64", 1, 8},
	Q4_0: {"Q4_0", 32, 18}, Q4_1: {"Q4_1", 32, 20}, Q5_0: {"Q5_0", 32, 22}, Q5_1: {"Q5_1", 32, 24}, Q8_0: {"Q8_0", 32, 34},
	Q2_K: {"Q2_K", 256, 84}, Q3_K: {"Q3_K", 256, 110}, Q4_K: {"Q4_K", 256, 144}, Q5_K: {"Q5_K", 256, 176}, Q6_K: {"Q6_K", 256, 210},
	IQ4_NL: {"IQ4_NL", 32, 18}, IQ4_XS: {"IQ4_XS", 256, 136},
}

// Known reports whether t is one of the types above.
func (t Type) Known() bool { _, ok := blocks[t]; return ok }

// BlockLen returns how many numbers a block holds; 0 for an unknown type.
func (t Type) BlockLen() int { return blocks[t].len }

// BlockBytes returns the size of a block in bytes; 0 for an unknown type.
func (t Type) BlockBytes() int { return blocks[t].bytes }

// String returns the usual name, e.g. "Q4_K".
func (t Type) String() string {
	if b, ok := blocks[t]; ok {
		return b.name
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// ParseType returns the type of a name, in any case.
func ParseType(name string) (Type, error) {
	for t, b := range blocks {
		if strings.EqualFold(b.name, name) {
			return t, nil
		}
	}
	return 0, fmt.Errorf("tensor type %q is not known", name)
}
