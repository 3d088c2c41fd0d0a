package tensor

import "sync/atomic"

// Sweep reads all of b once with all threads, as fast as this machine can: the bound for every product whose weights no cache
// holds. The result is some of the bits that were read, so that no compiler leaves reading out.
func (p *Pool) Sweep(b []byte) uint64 {
	const line = 256 // bytes that are read at once
	var all atomic.Uint64
	p.Run(len(b)/line, 4096, func(lo, hi int) { all.Or(sweep(p.isa, b[lo*line:hi*line])) })
	return all.Load() | sweepScalar(b[len(b)/line*line:])
}

func sweepScalar(b []byte) uint64 {
	var all byte
	for _, v := range b {
		all |= v
	}
	return uint64(all)
}
