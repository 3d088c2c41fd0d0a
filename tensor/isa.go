package tensor

// An ISA is a set of instructions that there are kernels for. Each has all that those before it have.
type ISA int

const (
	Scalar ISA = iota // Go only
	AVX2              // with FMA and F16C
	AVX512            // with BW, VL and VNNI
)

// String returns the usual name.
func (i ISA) String() string { return [...]string{"scalar", "AVX2", "AVX-512"}[i] }
