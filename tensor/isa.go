package tensor

// An ISA is a set of instructions that there are kernels for. Each has all that those before it have on the same kind of machine.
type ISA int

const (
	Scalar     ISA = iota // Go only
	AVX2                  // amd64 with FMA and F16C
	AVX512                // with BW, DQ, VL and VNNI
	AVX512BF16            // products of pairs of BF16, for many tokens
	AMX                   // tiles of int8 and BF16, for products with many tokens
	NEON                  // arm64, all of them
	DotProd               // with products of four bytes at once
)

// String returns the usual name.
func (i ISA) String() string {
	return [...]string{"scalar", "AVX2", "AVX-512", "AVX-512 with BF16", "AMX", "NEON", "NEON with dot products"}[i]
}
