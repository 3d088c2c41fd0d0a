package tokenizer

import "unicode/utf8"

// Byte-level vocabularies write every byte as a visible character: those that
// are visible in Latin-1 as themselves, the rest as U+0100 and up, in order.
// byteAt tells which byte a character writes.
var byteAt = func() map[rune]byte {
	bytes := make(map[rune]byte, 256)
	next := rune(256)
	for i := range 256 {
		r := rune(i)
		visible := r >= '!' && r <= '~' || r >= 0xA1 && r <= 0xAC || r >= 0xAE && r <= 0xFF
		if !visible {
			r = next
			next++
		}
		bytes[r] = byte(i)
	}
	return bytes
}()

// unmap returns the bytes that a name of a byte-level vocabulary writes; characters
// that no byte is written as stand for themselves.
func unmap(name string) string {
	plain := true
	for i := 0; i < len(name) && plain; i++ {
		plain = name[i] >= '!' && name[i] <= '~'
	}
	if plain {
		return name
	}
	b := make([]byte, 0, len(name))
	for _, r := range name {
		if c, ok := byteAt[r]; ok {
			b = append(b, c)
		} else {
			b = utf8.AppendRune(b, r)
		}
	}
	return string(b)
}
