//go:build !amd64

package tensor

// Best returns the fastest ISA of this machine.
func Best() ISA { return Scalar }
