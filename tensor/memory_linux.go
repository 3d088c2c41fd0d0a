package tensor

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugePage is what an address must be a multiple of for the kernel to use huge pages, in bytes.
const hugePage = 2 << 20

// Memory is memory outside the garbage-collected heap, on huge pages if the kernel has them: reading weights is bound by the
// memory's speed, and with small pages a good part of that goes into looking up addresses.
type Memory struct {
	mapped []byte
	bytes  []byte
}

// Alloc returns n bytes of zeros that start on a huge page. They take real memory when they are first written. Errors say how
// much was asked for.
func Alloc(n int) (*Memory, error) {
	if n <= 0 {
		return nil, fmt.Errorf("allocate %d bytes: the size must be positive", n)
	}
	size := (n+hugePage-1)/hugePage*hugePage + hugePage
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("allocate %d bytes: %w", n, err)
	}
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & (hugePage - 1))
	// Without huge pages all works, only slower; kernels may be built or set so.
	_ = unix.Madvise(b[skip:size-hugePage+skip], unix.MADV_HUGEPAGE)
	return &Memory{mapped: b, bytes: b[skip : skip+n : skip+n]}, nil
}

// Bytes returns the memory; it must not be used after Free.
func (m *Memory) Bytes() []byte { return m.bytes }

// Free gives the memory back. A second call does nothing.
func (m *Memory) Free() error {
	if m.mapped == nil {
		return nil
	}
	b := m.mapped
	m.mapped, m.bytes = nil, nil
	return unix.Munmap(b)
}
