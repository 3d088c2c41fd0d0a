package chat

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A tokenKind is what a token is.
type tokenKind int

const (
	tokText     tokenKind = iota // between tags
	tokTag                       // {%, begins a statement
	tokPrint                     // {{, begins an expression that is printed
	tokEnd                       // %} or }}
	tokName                      // also keywords
	tokString                    // text holds what it means
	tokInt                       // text holds its digits
	tokFloat                     // as well
	tokOperator                  // text is it
	tokEOF
)

type token struct {
	kind tokenKind
	text string
	line int
}

// lex cuts a template into tokens, with the white space around tags removed as
// Hugging Face sets Jinja up: the newline after a statement or a comment goes, and so
// does what is before one on its line if it is blank.
func lex(source string) ([]token, error) {
	source = strings.ReplaceAll(source, "\r\n", "\n")
	source = strings.TrimSuffix(source, "\n")
	l := lexer{rest: source, line: 1, lineStart: true}
	for l.rest != "" {
		if err := l.next(); err != nil {
			return nil, fmt.Errorf("line %d: %w", l.line, err)
		}
	}
	return append(l.tokens, token{kind: tokEOF, line: l.line}), nil
}

type lexer struct {
	rest      string
	line      int
	tokens    []token
	trim      bool // the tag before ended with a minus: white space goes
	lineStart bool // rest begins a line
}

func (l *lexer) add(kind tokenKind, text string) {
	l.tokens = append(l.tokens, token{kind, text, l.line})
}

// skip moves on by n bytes.
func (l *lexer) skip(n int) {
	l.line += strings.Count(l.rest[:n], "\n")
	l.rest = l.rest[n:]
}

// next reads text and the tag after it.
func (l *lexer) next() error {
	at := tagStart(l.rest)
	text := l.rest[:at]
	tag := ""
	sign := byte(0)
	if at < len(l.rest) {
		tag = l.rest[at : at+2]
		if at+2 < len(l.rest) {
			sign = l.rest[at+2]
		}
	}
	shown := text
	if l.trim {
		shown = strings.TrimLeftFunc(shown, unicode.IsSpace)
	}
	switch {
	case sign == '-' && tag != "":
		shown = strings.TrimRightFunc(shown, unicode.IsSpace)
	case sign != '+' && (tag == "{%" || tag == "{#"):
		line := strings.LastIndexByte(text, '\n') + 1
		if blank := strings.TrimRight(text[line:], " \t") == ""; blank && (line > 0 || l.lineStart) {
			shown = shown[:max(0, len(shown)-(len(text)-line))]
		}
	}
	if shown != "" {
		l.add(tokText, shown)
	}
	l.trim = false
	l.skip(at)
	if tag == "" {
		return nil
	}
	l.skip(2)
	if tag == "{#" {
		end := strings.Index(l.rest, "#}")
		if end < 0 {
			return errors.New("a comment does not end")
		}
		l.trim = end > 0 && l.rest[end-1] == '-'
		l.skip(end + 2)
		l.afterBlock("")
		return nil
	}
	if sign == '-' || sign == '+' {
		l.skip(1)
	}
	if tag == "{{" {
		l.add(tokPrint, tag)
		return l.expression("}}")
	}
	l.add(tokTag, tag)
	if err := l.expression("%}"); err != nil {
		return err
	}
	l.afterBlock(l.tokens[len(l.tokens)-1].text)
	return nil
}

// afterBlock removes the newline after a statement or comment, unless a plus at its
// end says otherwise.
func (l *lexer) afterBlock(sign string) {
	l.lineStart = false
	if sign != "+" && strings.HasPrefix(l.rest, "\n") {
		l.skip(1)
		l.lineStart = true
	}
}

func tagStart(s string) int {
	for i := 0; i+1 < len(s); i++ {
		if s[i] == '{' && (s[i+1] == '{' || s[i+1] == '%' || s[i+1] == '#') {
			return i
		}
	}
	return len(s)
}

// operators are tried in this order, the longest first.
var operators = []string{"**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "<", ">", "=", "(", ")", "[", "]", "{", "}", ",", ":", ".", "|"}

// expression reads tokens up to the end of the tag.
func (l *lexer) expression(end string) error {
	depth := 0 // of brackets, since }} may end two of them
	for {
		l.skip(len(l.rest) - len(strings.TrimLeftFunc(l.rest, unicode.IsSpace)))
		if l.rest == "" {
			return errors.New("a tag does not end")
		}
		if depth == 0 {
			for _, sign := range []string{"-", "+", ""} {
				if strings.HasPrefix(l.rest, sign+end) {
					l.trim, l.lineStart = sign == "-", false
					l.skip(len(sign + end))
					l.add(tokEnd, sign)
					return nil
				}
			}
		}
		c, size := utf8.DecodeRuneInString(l.rest)
		switch {
		case c == '_' || unicode.IsLetter(c):
			n := strings.IndexFunc(l.rest, func(r rune) bool { return r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) })
			l.word(tokName, n)
		case c >= '0' && c <= '9':
			l.number()
		case c == '"' || c == '\'':
			if err := l.text(c, size); err != nil {
				return err
			}
		default:
			i := slices.IndexFunc(operators, func(op string) bool { return strings.HasPrefix(l.rest, op) })
			if i < 0 {
				return fmt.Errorf("%q has no meaning here", c)
			}
			switch operators[i] {
			case "(", "[", "{":
				depth++
			case ")", "]", "}":
				depth--
			}
			l.word(tokOperator, len(operators[i]))
		}
	}
}

// word takes n bytes as a token; all if n is negative.
func (l *lexer) word(kind tokenKind, n int) {
	if n < 0 {
		n = len(l.rest)
	}
	l.add(kind, l.rest[:n])
	l.skip(n)
}

func (l *lexer) number() {
	digits := func(i int) int {
		for i < len(l.rest) && (l.rest[i] >= '0' && l.rest[i] <= '9' || l.rest[i] == '_') {
			i++
		}
		return i
	}
	n, kind := digits(0), tokInt
	if n+1 < len(l.rest) && l.rest[n] == '.' && l.rest[n+1] >= '0' && l.rest[n+1] <= '9' {
		n, kind = digits(n+1), tokFloat
	}
	if n+1 < len(l.rest) && (l.rest[n] == 'e' || l.rest[n] == 'E') {
		from := n + 1
		if l.rest[from] == '-' || l.rest[from] == '+' {
			from++
		}
		if end := digits(from); end > from {
			n, kind = end, tokFloat
		}
	}
	l.add(kind, strings.ReplaceAll(l.rest[:n], "_", ""))
	l.skip(n)
}

// text reads a quoted text.
func (l *lexer) text(quote rune, from int) error {
	var b strings.Builder
	escaped := false
	for i, r := range l.rest[from:] {
		switch {
		case escaped:
			switch r {
			case 'n':
				b.WriteByte('\n')
			case 't':
				b.WriteByte('\t')
			case 'r':
				b.WriteByte('\r')
			case '\\', '\'', '"':
				b.WriteRune(r)
			case 'u', 'x':
				return fmt.Errorf("%w: the escape \\%c", errors.ErrUnsupported, r)
			default:
				b.WriteByte('\\')
				b.WriteRune(r)
			}
			escaped = false
		case r == '\\':
			escaped = true
		case r == quote:
			l.add(tokString, b.String())
			l.skip(from + i + 1)
			return nil
		default:
			b.WriteRune(r)
		}
	}
	return errors.New("a quoted text does not end")
}
