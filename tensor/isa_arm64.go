package tensor

import "golang.org/x/sys/cpu"

// best is what rows are computed with.
var best = func() ISA {
	if cpu.ARM64.HasASIMDDP {
		return DotProd
	}
	return NEON
}()

// Best returns the fastest ISA of this machine.
func Best() ISA { return best }

// kernels is the ISA that the tables of kernels have.
func (i ISA) kernels() ISA { return i }

// There are no tiles here: many tokens are multiplied as others are.

func (p *Pool) tiled(*Input) []Range { return nil }

func (in *Input) split(*Pool, Type) {}

func (p *Pool) multiplyMany(*Product, *Input, int, int) []Range { return nil }
