//go:build race

package transfer

// The race detector makes everything here tens of times slower, compression above
// all, and sees the same goroutines meet in few cases over small inputs.
const (
	thin  = 32 // divides inputs and the places that are damaged in them
	every = 16 // of so many cases one is tried
)
