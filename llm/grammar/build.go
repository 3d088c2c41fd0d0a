package grammar

import (
	"unicode/utf8"

	"github.com/atoll-run/atoll/sandbox"
)

// builder collects rules. Its methods return the number of a rule that matches
// what they were asked for; rule 0 is kept for the start.
type builder struct {
	rules   []rule
	literal map[string]int
	named   map[string]int // the fixed rules of JSON, and schemas by reference
	strict  bool           // refuse what cannot be enforced
	root    value          // the whole schema, for references
	depth   int
	err     error
}

func newBuilder() *builder {
	return &builder{rules: make([]rule, 1), literal: map[string]int{}, named: map[string]int{}}
}

func (b *builder) fail(format string, args ...any) int {
	if b.err == nil {
		b.err = sandbox.Errorf("grammar.Schema", sandbox.Invalid, "", format, args...)
	}
	return 0
}

// add makes a rule of alternatives.
func (b *builder) add(alts ...[]element) int {
	if len(b.rules) > maxRules {
		return b.fail("the schema is too large")
	}
	b.rules = append(b.rules, alts)
	return len(b.rules) - 1
}

// once makes a named rule the first time it is asked for. The rule may refer to
// itself.
func (b *builder) once(name string, make func() [][]element) int {
	if id, ok := b.named[name]; ok {
		return id
	}
	id := b.add()
	b.named[name] = id
	alts := make()
	b.rules[id] = alts
	return id
}

func ref(rule int) element { return element{rule: rule} }

func bytesOf(c class) element { return element{rule: -1, set: c} }

func one(c byte) element { return bytesOf(span(c, c)) }

// text is the elements of a fixed text.
func text(s string) []element {
	es := make([]element, len(s))
	for i := range len(s) {
		es[i] = one(s[i])
	}
	return es
}

func (b *builder) text(s string) int {
	id, ok := b.literal[s]
	if !ok {
		id = b.add(text(s))
		b.literal[s] = id
	}
	return id
}

// maxRepeat bounds counted repetition, which is written out.
const maxRepeat = 4096

// repeat matches e from low to high times, with sep between; high < 0 is without
// bound.
func (b *builder) repeat(e element, sep []element, low, high int) int {
	if low > maxRepeat || high > maxRepeat || (high >= 0 && low > high) || low < 0 {
		return b.fail("cannot repeat from %d to %d times", low, high)
	}
	// From the end: what may follow when i have been matched.
	var after int
	if high < 0 {
		after = b.add() // any number more
		more := append(append([]element{}, sep...), e, ref(after))
		b.rules[after] = rule{nil, more}
	} else {
		after = b.add(nil)
	}
	last := max(low, 1)
	if high >= 0 {
		last = high
	}
	for i := last - 1; i >= 1; i-- {
		next := append(append([]element{}, sep...), e, ref(after))
		if i >= low {
			after = b.add(nil, next)
		} else {
			after = b.add(next)
		}
	}
	if high == 0 {
		return after
	}
	first := []element{e, ref(after)}
	if low == 0 {
		return b.add(nil, first)
	}
	return b.add(first)
}

// space is what may stand between the parts of JSON: nothing, one blank, or a
// line break with an indent. It is bounded, since small models fall into
// writing blanks for ever.
func (b *builder) space() int {
	return b.once("space", func() [][]element {
		var blank class
		blank.add(' ')
		blank.add('\t')
		indent := b.repeat(bytesOf(blank), nil, 0, 20)
		return [][]element{nil, text(" "), {one('\n'), ref(indent)}}
	})
}

// char is one character of a JSON string, whole in UTF-8, or an escape.
func (b *builder) char() int {
	return b.once("char", func() [][]element {
		plain := span(0x20, 0x7f)
		plain['"'>>6] &^= 1 << ('"' & 63)
		plain['\\'>>6] &^= 1 << ('\\' & 63)
		var simple class
		for _, c := range []byte(`"\/bfnrt`) {
			simple.add(c)
		}
		hex := bytesOf(hexDigit())
		alts := [][]element{{bytesOf(plain)}, {one('\\'), bytesOf(simple)}, {one('\\'), one('u'), hex, hex, hex, hex}}
		return append(alts, utf8Ranges(0x80, utf8.MaxRune)...)
	})
}

func hexDigit() class {
	c := span('0', '9')
	for _, d := range []byte("abcdefABCDEF") {
		c.add(d)
	}
	return c
}

// utf8Ranges is the sequences of bytes that encode the runes from lo to hi,
// surrogates left out.
func utf8Ranges(lo, hi rune) [][]element {
	var alts [][]element
	for _, r := range [][2]rune{{0, 0x7f}, {0x80, 0x7ff}, {0x800, 0xd7ff}, {0xe000, 0xffff}, {0x10000, utf8.MaxRune}} {
		if a, z := max(lo, r[0]), min(hi, r[1]); a <= z {
			alts = append(alts, splitRange(a, z)...)
		}
	}
	return alts
}

// splitRange encodes a range whose ends take equally many bytes: where the
// leading bytes differ, it is cut so that all that follow run over full ranges.
func splitRange(lo, hi rune) [][]element {
	for i := 1; i < utf8.UTFMax; i++ {
		m := rune(1)<<(6*i) - 1 // what the last i bytes hold
		if utf8.RuneLen(hi) <= i || lo&^m == hi&^m {
			continue
		}
		if lo&m != 0 {
			return append(splitRange(lo, lo|m), splitRange((lo|m)+1, hi)...)
		}
		if hi&m != m {
			return append(splitRange(lo, hi&^m-1), splitRange(hi&^m, hi)...)
		}
	}
	a, z := string(lo), string(hi)
	seq := make([]element, len(a))
	for i := range len(a) {
		seq[i] = bytesOf(span(a[i], z[i]))
	}
	return [][]element{seq}
}
