package transfer

import "github.com/zeebo/xxh3"

// An anchor is a place in a page that its content chooses, so that the same content is found again wherever it lies.
type anchor struct {
	end    int    // bytes from the start of the page to the end of the context
	key    uint64 // hash of the context
	inBase bool   // the base has it too
}

const (
	// anchorContext is how many bytes before an anchor must be the same: long enough not to be found by accident.
	anchorContext = 48
	// anchorBits says how seldom anchors are: one in 1<<anchorBits bytes.
	anchorBits = 7
)

// gear gives each byte value a random number (xorshift, a fixed seed). It is part of what an index means.
var gear = func() (g [256]uint64) {
	x := uint64(88172645463325252)
	for i := range g {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		g[i] = x * 0x9E3779B97F4A7C15
	}
	return g
}()

// anchors appends the anchors of a page. The rolling hash of the last 64 bytes decides where they are.
func anchors(list []anchor, page []byte) []anchor {
	var h uint64
	for i, b := range page {
		h = h<<1 + gear[b]
		if h>>(64-anchorBits) == 0 && i >= anchorContext {
			end := i + 1
			list = append(list, anchor{end: end, key: xxh3.Hash(page[end-anchorContext : end])})
		}
	}
	return list
}
