package sandbox

import (
	"crypto/rand"
	"regexp"
)

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// idPattern is narrower than DNS labels need, since E2B's clients build host
// names "{port}-{id}.{domain}" and split them at the first hyphen.
var idPattern = regexp.MustCompile(`^[a-z0-9]{1,40}$`)

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

// ValidID reports whether id can name a sandbox.
func ValidID(id string) bool { return idPattern.MatchString(id) }
