// Package gguf reads and writes GGUF, the file format in which language models
// for CPUs are passed around: metadata, then tensors, each aligned.
//
// Everything in a file is foreign: counts and lengths are checked against what
// the file can hold before anything is allocated, and tensors must lie inside
// the file without overlapping. What a reader gets has passed all checks.
package gguf

import (
	"fmt"
	"slices"
)

// The bounds of what is read. The largest models in use stay below a tenth of each.
const (
	maxHeader    = 1 << 29 // bytes of metadata and tensor records
	maxKeys      = 1 << 16
	maxTensors   = 1 << 17
	maxKey       = 1<<16 - 1 // bytes
	maxString    = 1 << 24   // bytes
	maxArray     = 1 << 25   // elements
	maxDims      = 4
	maxName      = 256 // bytes of a tensor's name
	maxAlignment = 1 << 20
)

// The keys that every file has, or that this package acts on.
const (
	KeyArchitecture = "general.architecture"
	KeyAlignment    = "general.alignment"
)

const (
	magic            = "GGUF"
	versionOldest    = 2 // version 1 had 32-bit counts and is no longer found
	versionNow       = 3
	defaultAlignment = 32
)

// A File is what the front of a GGUF file says.
type File struct {
	Version   uint32
	Meta      Meta
	Tensors   []Tensor // in the order of the file
	Alignment int64    // of tensors, in bytes; a power of two
	DataStart int64    // where the first tensor may begin, in bytes from the start of the file

	byName map[string]int
}

// A Tensor says what one tensor is and where it lies.
type Tensor struct {
	Name   string
	Type   Type
	Dims   []int64 // 1 to 4; Dims[0] is the length of a row, which lies together
	Offset int64   // in bytes from the start of the file
	Size   int64   // in bytes
}

// Cols returns the length of a row in elements.
func (t *Tensor) Cols() int { return int(t.Dims[0]) }

// Rows returns how many rows there are, over all higher dimensions.
func (t *Tensor) Rows() int {
	n := int64(1)
	for _, d := range t.Dims[1:] {
		n *= d
	}
	return int(n)
}

// Elements returns how many numbers the tensor holds.
func (t *Tensor) Elements() int64 { return int64(t.Rows()) * t.Dims[0] }

// Tensor returns the tensor of a name, or nil when there is none. The result
// points into f.
func (f *File) Tensor(name string) *Tensor {
	i, ok := f.byName[name]
	if !ok {
		return nil
	}
	return &f.Tensors[i]
}

// Architecture returns the model family, e.g. "llama", which also begins the
// keys of its hyperparameters; empty when the file does not say.
func (f *File) Architecture() string {
	s, _ := f.Meta.String(KeyArchitecture)
	return s
}

// End returns where the last tensor ends, in bytes from the start of the file.
func (f *File) End() int64 {
	end := f.DataStart
	for i := range f.Tensors {
		end = max(end, f.Tensors[i].Offset+f.Tensors[i].Size)
	}
	return end
}

// size returns the bytes of a tensor, or why it has none.
func size(typ Type, dims []int64) (int64, error) {
	if !typ.Known() {
		return 0, fmt.Errorf("tensor type %d is not known", uint32(typ))
	}
	if len(dims) < 1 || len(dims) > maxDims {
		return 0, fmt.Errorf("%d dimensions, want 1 to %d", len(dims), maxDims)
	}
	const limit = int64(1) << 48 // elements; far above any model, far below overflow
	n := int64(1)
	for _, d := range dims {
		if d < 1 || d > limit/n {
			return 0, fmt.Errorf("dimensions %v make no sense", dims)
		}
		n *= d
	}
	block := int64(typ.BlockLen())
	if dims[0]%block != 0 {
		return 0, fmt.Errorf("rows of %d elements do not divide into %s blocks of %d", dims[0], typ, block)
	}
	return n / block * int64(typ.BlockBytes()), nil
}

// place gives f its index of names and checks that tensors are aligned, have
// names of their own and lie apart, and inside of end bytes if that is known
// (not negative).
func (f *File) place(end int64) error {
	f.byName = make(map[string]int, len(f.Tensors))
	order := make([]int, len(f.Tensors))
	for i := range f.Tensors {
		t := &f.Tensors[i]
		if _, taken := f.byName[t.Name]; taken {
			return fmt.Errorf("two tensors are named %q", t.Name)
		}
		f.byName[t.Name] = i
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return int(min(1, max(-1, f.Tensors[a].Offset-f.Tensors[b].Offset))) })
	last := f.DataStart
	for _, i := range order {
		t := &f.Tensors[i]
		if t.Offset < last {
			return fmt.Errorf("tensor %q overlaps another", t.Name)
		}
		last = t.Offset + t.Size
		if end >= 0 && last > end {
			return fmt.Errorf("tensor %q needs bytes %d to %d of a file of %d: the file is cut off", t.Name, t.Offset, last, end)
		}
	}
	return nil
}

func align(n, to int64) int64 { return (n + to - 1) &^ (to - 1) }
