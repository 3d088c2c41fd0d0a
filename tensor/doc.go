// Package tensor computes with the weights of language models on CPUs, over plain slices.
//
// Every operation has a scalar reference in Go, which is what it means; the assembly variants (AVX2, AVX-512 VNNI, AMX; NEON)
// are generated, chosen at run time and tested against it. Shapes are written [outer][inner], row-major. Sizes that do not
// fit together are defects of the caller and panic as an index out of range does; what comes from files is checked by Pack
// and Dequantise, which return errors.
package tensor

//go:generate ./generate.sh
