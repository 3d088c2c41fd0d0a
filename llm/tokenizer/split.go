package tokenizer

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A splitter returns the length in bytes of the word that text begins with, at
// least 1. It is what a regular expression with look-ahead would say, in one pass;
// the expression stands beside each, and a test holds the two together.
type splitter func(text string) int

// splitters returns how text is cut, by the name that GGUF files have for it.
func splitters(name string) ([]splitter, error) {
	switch name {
	case "gpt-2", "gpt2", "default", "":
		return []splitter{splitGPT2}, nil
	case "smollm":
		return []splitter{splitDigits, splitGPT2}, nil
	case "llama-bpe", "llama3", "llama-v3":
		return []splitter{splitLlama3}, nil
	case "qwen2":
		return []splitter{splitQwen2}, nil
	case "tekken":
		return []splitter{splitTekken}, nil
	}
	return nil, fmt.Errorf("text of this vocabulary is cut in a way that is not known here: %q", name)
}

// cut calls word with each word of text: each splitter cuts what the one before
// left whole.
func cut(words []splitter, text string, word func(string)) {
	if len(words) == 0 {
		word(text)
		return
	}
	for len(text) > 0 {
		n := words[0](text)
		cut(words[1:], text[:n], word)
		text = text[n:]
	}
}

// A class is what splitters ask of a character.
type class uint8

const (
	letter class = iota
	digit
	white
	other
)

func classOf(r rune) class {
	if r < utf8.RuneSelf {
		switch {
		case r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z':
			return letter
		case r >= '0' && r <= '9':
			return digit
		case r == ' ' || r >= '\t' && r <= '\r':
			return white
		}
		return other
	}
	switch {
	case unicode.IsLetter(r):
		return letter
	case unicode.Is(unicode.N, r):
		return digit
	case unicode.IsSpace(r):
		return white
	}
	return other
}

// next returns the class of the character at i, and where it ends; other and i at
// the end of text.
func next(text string, i int) (class, int) {
	if i < len(text) && text[i] < utf8.RuneSelf {
		return classOf(rune(text[i])), i + 1
	}
	r, n := utf8.DecodeRuneInString(text[i:])
	return classOf(r), i + n
}

// run returns the end of the characters of a class that begin at i, of at most
// most of them; no bound if most is 0.
func run(text string, i int, c class, most int) int {
	for n := 0; i < len(text) && (most == 0 || n < most); n++ {
		k, end := next(text, i)
		if k != c {
			break
		}
		i = end
	}
	return i
}

// \p{N}|\P{N}+
func splitDigits(text string) int {
	c, end := next(text, 0)
	if c == digit {
		return end
	}
	for end < len(text) {
		c, n := next(text, end)
		if c == digit {
			break
		}
		end = n
	}
	return end
}

// ▁*[^▁]*
func splitSpaces(text string) int {
	end := 0
	for strings.HasPrefix(text[end:], space) {
		end += len(space)
	}
	if n := strings.Index(text[end:], space); n >= 0 {
		return end + n
	}
	return len(text)
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
func splitGPT2(text string) int {
	if n := contraction(text, false); n > 0 {
		return n
	}
	from := 0
	if text[0] == ' ' {
		from = 1
	}
	if from < len(text) {
		if c, _ := next(text, from); c != white {
			return run(text, from, c, 0)
		}
	}
	return whitespace(text)
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
func splitLlama3(text string) int { return splitModern(text, 3) }

// The same with \p{N} for \p{N}{1,3}.
func splitQwen2(text string) int { return splitModern(text, 1) }

func splitModern(text string, digits int) int {
	if n := contraction(text, true); n > 0 {
		return n
	}
	c, end := next(text, 0)
	switch {
	case c == letter:
		return run(text, end, letter, 0)
	case c == digit:
		return run(text, 0, digit, digits)
	case text[0] != '\r' && text[0] != '\n':
		if n := run(text, end, letter, 0); n > end {
			return n
		}
	}
	if n := symbols(text, ""); n > 0 {
		return n
	}
	if n := newlines(text); n > 0 {
		return n
	}
	return whitespace(text)
}

// [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|
// [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|
// \p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
func splitTekken(text string) int {
	c, end := next(text, 0)
	prefix := 0
	if c != letter && c != digit && text[0] != '\r' && text[0] != '\n' {
		prefix = end
	}
	for _, words := range []func(string, int) int{lowerWord, upperWord} {
		if prefix > 0 {
			if n := words(text, prefix); n > 0 {
				return n
			}
		}
		if n := words(text, 0); n > 0 {
			return n
		}
	}
	if c == digit {
		return end
	}
	if n := symbols(text, "/"); n > 0 {
		return n
	}
	if n := newlines(text); n > 0 {
		return n
	}
	return whitespace(text)
}

func isUpper(r rune) bool {
	return unicode.In(r, unicode.Lu, unicode.Lt, unicode.Lm, unicode.Lo, unicode.M)
}

func isLower(r rune) bool { return unicode.In(r, unicode.Ll, unicode.Lm, unicode.Lo, unicode.M) }

// span returns the end of the characters from i that are so.
func span(text string, i int, so func(rune) bool) int {
	for i < len(text) {
		r, n := utf8.DecodeRuneInString(text[i:])
		if !so(r) {
			break
		}
		i += n
	}
	return i
}

// lowerWord returns where a word from i ends that has small letters at its end,
// after any capital ones; 0 if there is none.
func lowerWord(text string, i int) int {
	upper := span(text, i, isUpper)
	if end := span(text, upper, isLower); end > upper {
		return end
	}
	// Letters without case count as both: the last of the capital ones may be it.
	for end := upper; end > i; {
		r, n := utf8.DecodeLastRuneInString(text[i:end])
		if isLower(r) {
			return end
		}
		end -= n
	}
	return 0
}

// upperWord returns where a word from i ends that has a capital letter at its
// beginning; 0 if there is none.
func upperWord(text string, i int) int {
	upper := span(text, i, isUpper)
	if upper == i {
		return 0
	}
	return span(text, upper, isLower)
}

// contraction returns the length of an English ending such as 'll; 0 if there is
// none.
func contraction(text string, anyCase bool) int {
	if len(text) < 2 || text[0] != '\'' {
		return 0
	}
	lower := func(i int) byte {
		if i >= len(text) {
			return 0
		}
		if c := text[i]; anyCase && c >= 'A' && c <= 'Z' {
			return c + 'a' - 'A'
		}
		return text[i]
	}
	switch lower(1) {
	case 's', 't', 'm', 'd':
		return 2
	case 'r', 'v':
		if lower(2) == 'e' {
			return 3
		}
	case 'l':
		if lower(2) == 'l' {
			return 3
		}
	}
	if anyCase && len(text) >= 3 && text[1:3] == "\u017f" { // the long s is an s too
		return 3
	}
	return 0
}

// symbols is " ?[^\s\p{L}\p{N}]+[\r\n]*", where also more than newlines may end it;
// 0 if text does not begin so.
func symbols(text, also string) int {
	from := 0
	if text[0] == ' ' {
		from = 1
	}
	end := run(text, from, other, 0)
	if end == from {
		return 0
	}
	for end < len(text) && (text[end] == '\r' || text[end] == '\n' || also != "" && text[end] == also[0]) {
		end++
	}
	return end
}

// newlines is "\s*[\r\n]+": white space up to its last newline; 0 if it has none.
func newlines(text string) int {
	for i := run(text, 0, white, 0); i > 0; i-- {
		if text[i-1] == '\r' || text[i-1] == '\n' {
			return i
		}
	}
	return 0
}

// whitespace is "\s+(?!\S)|\s+": all of it at the end of text, else all but the last
// character, which goes with what follows. What is not white space is one
// character, so that splitting always goes on.
func whitespace(text string) int {
	end := run(text, 0, white, 0)
	if end == 0 {
		_, end = next(text, 0)
		return end
	}
	if end == len(text) {
		return end
	}
	_, last := utf8.DecodeLastRuneInString(text[:end])
	if end > last {
		return end - last
	}
	return end
}
