package wire

import (
	"strings"
	"unicode/utf8"
)

// A Linux file name, like an argument of a command, is any bytes but NUL, while JSON and proto strings
// must be UTF-8. So a byte 0xNN that is not part of valid UTF-8 travels as the
// private-use rune U+10FENN. A name that really holds one of these 256 runes
// has its bytes escaped one by one, so that every name survives a round trip.
const (
	escapeFirst = rune(0x10FE00)
	escapeLast  = rune(0x10FEFF)
)

// EncodeName turns any file name or path into valid UTF-8.
func EncodeName(name string) string {
	if utf8.ValidString(name) && !hasEscape(name) {
		return name
	}
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		if (r == utf8.RuneError && n == 1) || isEscape(r) {
			for i := range n {
				b.WriteRune(escapeFirst + rune(name[i]))
			}
		} else {
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return b.String()
}

// DecodeName is the inverse of EncodeName.
func DecodeName(text string) string {
	if !hasEscape(text) {
		return text
	}
	var b strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		if isEscape(r) {
			b.WriteByte(byte(r - escapeFirst))
		} else {
			b.WriteString(text[:n])
		}
		text = text[n:]
	}
	return b.String()
}

func isEscape(r rune) bool { return r >= escapeFirst && r <= escapeLast }

// hasEscape looks for the three bytes that start every escape: 0x10FE00 to
// 0x10FEFF are F4 8F B8..BB xx.
func hasEscape(s string) bool {
	return strings.Contains(s, "\xf4\x8f") && strings.IndexFunc(s, isEscape) >= 0
}
