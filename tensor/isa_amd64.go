package tensor

import "golang.org/x/sys/cpu"

// Best returns the fastest ISA of this machine.
func Best() ISA { return best }

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
