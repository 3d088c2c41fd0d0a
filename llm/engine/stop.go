package engine

import (
	"bytes"
	"unicode/utf8"
)

// ending finds stop strings in text that arrives in pieces, and lets out only
// what can no longer become part of one, and only whole characters.
type ending struct {
	stops [][]byte
	held  []byte
}

func newEnding(stops []string) *ending {
	e := &ending{}
	for _, s := range stops {
		if s != "" {
			e.stops = append(e.stops, []byte(s))
		}
	}
	return e
}

// add returns the text that may be shown now, and whether a stop string was found;
// then nothing more may be added.
func (e *ending) add(piece []byte) (text string, stopped bool) {
	e.held = append(e.held, piece...)
	first := -1
	for _, s := range e.stops {
		if i := bytes.Index(e.held, s); i >= 0 && (first < 0 || i < first) {
			first = i
		}
	}
	if first >= 0 {
		return string(e.take(first)), true
	}
	keep := 0
	for _, s := range e.stops {
		for n := min(len(s)-1, len(e.held)); n > keep; n-- {
			if bytes.HasSuffix(e.held, s[:n]) {
				keep = n
				break
			}
		}
	}
	n := len(e.held) - keep
	return string(e.take(whole(e.held[:n]))), false
}

// rest returns what was held back, when nothing more comes.
func (e *ending) rest() string {
	return string(bytes.ToValidUTF8(e.take(len(e.held)), []byte("\uFFFD")))
}

func (e *ending) take(n int) []byte {
	out := bytes.Clone(e.held[:n])
	e.held = append(e.held[:0], e.held[n:]...)
	return bytes.ToValidUTF8(out, []byte("\uFFFD"))
}

// whole is how many bytes of b remain without a character at the end of which
// only a part is there.
func whole(b []byte) int {
	for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
		if c := b[len(b)-i]; utf8.RuneStart(c) {
			if !utf8.FullRune(b[len(b)-i:]) {
				return len(b) - i
			}
			break
		}
	}
	return len(b)
}
