package tensor

import (
	"sync"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// best is what rows are computed with.
var best = func() ISA {
	x := &cpu.X86
	switch {
	case !x.HasAVX2 || !x.HasFMA:
		return Scalar
	case x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VL && x.HasAVX512DQ && x.HasAVX512VNNI:
		return AVX512
	}
	return AVX2
}()

// Best returns the fastest ISA of this machine. The first call asks the kernel for the use of AMX, where there is such a thing.
func Best() ISA { return asked() }

var asked = sync.OnceValue(func() ISA {
	x := &cpu.X86
	if best < AVX512 || !x.HasAVX512BF16 {
		return best
	}
	if !x.HasAMXTile || !x.HasAMXInt8 || !x.HasAMXBF16 {
		return AVX512BF16
	}
	const request, tileData = 0x1023, 18 // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
	if _, _, err := unix.RawSyscall(unix.SYS_ARCH_PRCTL, request, tileData, 0); err != 0 {
		return AVX512BF16
	}
	return AMX
})

// kernels is the ISA that the tables of kernels have.
func (i ISA) kernels() ISA { return min(i, AVX512) }
