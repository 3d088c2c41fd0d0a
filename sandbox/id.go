package sandbox

import "crypto/rand"

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// NewID returns a fresh sandbox ID: 20 characters, over 100 bits of entropy, so
// that knowing an ID cannot be had by guessing.
func NewID() string {
	const n = 20
	var b [n]byte
	id := make([]byte, 0, n)
	for len(id) < n {
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		for _, c := range b {
			// 252 is the largest multiple of 36 that fits a byte: no bias.
			if c < 252 && len(id) < n {
				id = append(id, idAlphabet[int(c)%len(idAlphabet)])
			}
		}
	}
	return string(id)
}

// maxID is the longest ID, in bytes.
const maxID = 40

// ValidID reports whether id can name a sandbox: lower-case letters and digits,
// at most 40. That is narrower than a DNS label, since E2B's clients build host
// names "{port}-{id}.{domain}" and split them at the first hyphen.
func ValidID(id string) bool {
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return id != "" && len(id) <= maxID
}
