package pager

import (
	"errors"
	"fmt"
	"os"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// Layer is a file with pages of a memory.
type Layer struct {
	Length int64     `json:"length"` // of what Sums are of, in bytes
	Sums   []byte    `json:"sums"`
	First  int64     `json:"first"` // byte at which the pages begin
	Runs   []vmm.Run `json:"runs"`  // which they are, in ascending order
	// Late is the file's name for those who bring it, when it is still on its way; empty: all of it is there.
	Late string `json:"late,omitempty"`
}

// maxLayers bounds how many files make a memory.
const maxLayers = 16

// memory is a memory whose pages are read when they are asked for.
type memory struct {
	pages  uint32
	layers []*Checked
	// where is, for each page, where it lies: the layer's number plus one in the
	// uppermost 8 bits and the offset in its file in the others. 0: all zeros.
	where []uint64
}

// newMemory makes a memory of size bytes of layers, each upon the ones before. Those that are late are asked for on wants.
func newMemory(size int64, layers []Layer, files []*os.File, wants *os.File) (*memory, error) {
	if size <= 0 || size%vmm.PageSize != 0 || size/vmm.PageSize > 1<<28 || len(layers) > maxLayers || len(layers) != len(files) {
		return nil, fmt.Errorf("no memory of %d bytes in %d layers", size, len(layers))
	}
	m := &memory{pages: uint32(size / vmm.PageSize), where: make([]uint64, size/vmm.PageSize)}
	for i, l := range layers {
		c, err := NewChecked(files[i], l.Length, l.Sums)
		if err != nil {
			return nil, err
		}
		if l.Late != "" && wants != nil {
			c.late = &late{l.Late, wants}
		}
		m.layers = append(m.layers, c)
		at := l.First
		for _, r := range l.Runs {
			end := uint64(r.First) + uint64(r.Count)
			if end > uint64(m.pages) || at < 0 || at+int64(r.Count)*vmm.PageSize > l.Length {
				return nil, errors.New("a layer has pages beyond its file or the memory")
			}
			for p := uint64(r.First); p < end; p++ {
				m.where[p] = uint64(i+1)<<56 | uint64(at)
				at += vmm.PageSize
			}
		}
	}
	return m, nil
}

// has reports whether a page is somewhere, and not just zeros.
func (m *memory) has(page uint32) bool { return page < m.pages && m.where[page] != 0 }

// read fills buf, a whole number of pages, with the pages from first on; ahead: no machine waits for them.
func (m *memory) read(buf []byte, first uint32, ahead bool) error {
	for page := first; len(buf) > 0; page++ {
		part := buf[:vmm.PageSize]
		buf = buf[vmm.PageSize:]
		if !m.has(page) {
			clear(part)
			continue
		}
		at := m.where[page]
		if _, err := m.layers[at>>56-1].readAt(part, int64(at&(1<<56-1)), ahead); err != nil {
			return fmt.Errorf("page %d of the memory: %w", page, err)
		}
	}
	return nil
}
