package pack

import "crypto/subtle"

// split puts the first bytes of all numbers of n bytes before all second ones, and so on. What is left over at the end
// stays there.
func split(data []byte, n int) []byte {
	out := make([]byte, len(data))
	count := len(data) / n
	for p := range n {
		plane := out[p*count : (p+1)*count]
		for i := range plane {
			plane[i] = data[i*n+p]
		}
	}
	copy(out[count*n:], data[count*n:])
	return out
}

// join is the inverse of split.
func join(data []byte, n int) []byte {
	out := make([]byte, len(data))
	count := len(data) / n
	for p := range n {
		plane := data[p*count : (p+1)*count]
		for i, b := range plane {
			out[i*n+p] = b
		}
	}
	copy(out[count*n:], data[count*n:])
	return out
}

// xored returns the difference of data from an earlier version, which may be shorter or longer; it is its own inverse.
func xored(data, prior []byte) []byte {
	out := append([]byte(nil), data...)
	n := min(len(data), len(prior))
	subtle.XORBytes(out, data[:n], prior[:n])
	return out
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
