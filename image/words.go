package image

import (
	"strings"
)

// splitWords cuts text at blanks outside quotes. Quotes and escapes are kept for
// expandWord.
func splitWords(text string) ([]string, error) {
	var words []string
	var word strings.Builder
	quote, inWord := byte(0), false
	for at := 0; at < len(text); at++ {
		c := text[at]
		switch {
		case c == '\\' && quote != '\'' && at+1 < len(text):
			word.WriteByte(c)
			at++
			word.WriteByte(text[at])
			inWord = true
			continue
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == ' ' || c == '\t' || c == '\n':
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
			continue
		}
		word.WriteByte(c)
		inWord = true
	}
	if quote != 0 {
		return nil, invalid("a quote %c is not closed", quote)
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

// maxExpanded bounds a word after its variables are filled in, in bytes.
const maxExpanded = 1 << 20

// expandWord removes quotes and escapes and fills in $NAME, ${NAME},
// ${NAME:-default} and ${NAME:+other}. A variable that is not set is empty.
func expandWord(word string, lookup func(name string) (string, bool)) (string, error) {
	e := expander{text: word, lookup: lookup}
	return e.run(0)
}

type expander struct {
	text   string
	at     int
	lookup func(string) (string, bool)
}

// run expands up to the end, or up to the brace that ends a default.
func (e *expander) run(depth int) (string, error) {
	if depth > 10 {
		return "", invalid("variables are nested too deeply in %q", e.text)
	}
	var out strings.Builder
	quote := byte(0)
	for ; e.at < len(e.text); e.at++ {
		c := e.text[e.at]
		switch {
		case c == '\'' && quote != '"' || c == '"' && quote != '\'':
			if quote == 0 {
				quote = c
			} else {
				quote = 0
			}
		case c == '\\' && quote != '\'' && e.at+1 < len(e.text):
			e.at++
			if next := e.text[e.at]; quote == '"' && !strings.ContainsRune(`"\$`, rune(next)) {
				out.WriteByte('\\')
			}
			out.WriteByte(e.text[e.at])
		case c == '$' && quote != '\'':
			value, err := e.variable(depth)
			if err != nil {
				return "", err
			}
			out.WriteString(value)
		case c == '}' && depth > 0 && quote == 0:
			return out.String(), nil
		default:
			out.WriteByte(c)
		}
		if out.Len() > maxExpanded {
			return "", invalid("a word grows larger than %d bytes", maxExpanded)
		}
	}
	if depth > 0 {
		return "", invalid("a brace is not closed in %q", e.text)
	}
	return out.String(), nil
}

// variable expands what stands at a dollar sign and leaves at on its last byte.
func (e *expander) variable(depth int) (string, error) {
	rest := e.text[e.at+1:]
	braced := strings.HasPrefix(rest, "{")
	start := e.at + 1
	if braced {
		start++
	}
	end := start
	for end < len(e.text) && nameByte(e.text[end], end > start) {
		end++
	}
	name := e.text[start:end]
	if !braced {
		if name == "" {
			return "$", nil
		}
		e.at = end - 1
		value, _ := e.lookup(name)
		return value, nil
	}
	value, set := e.lookup(name)
	switch {
	case name == "" || end >= len(e.text):
		return "", invalid("%q is not a variable", e.text)
	case e.text[end] == '}':
		e.at = end
		return value, nil
	case strings.HasPrefix(e.text[end:], ":-") || strings.HasPrefix(e.text[end:], ":+"):
		plus := e.text[end+1] == '+'
		e.at = end + 2
		other, err := e.run(depth + 1)
		if err != nil {
			return "", err
		}
		if present := set && value != ""; present == plus {
			return other, nil
		} else if plus {
			return "", nil
		}
		return value, nil
	}
	return "", invalid("%q: only ${NAME}, ${NAME:-default} and ${NAME:+other} are supported", e.text)
}

func nameByte(c byte, digits bool) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || digits && c >= '0' && c <= '9'
}

// setEnv sets KEY in a list of KEY=value, in place if it is there.
func setEnv(env []string, key, value string) []string {
	line := key + "=" + value
	for i, e := range env {
		if strings.HasPrefix(e, key+"=") {
			env[i] = line
			return env
		}
	}
	return append(env, line)
}

// getEnv looks a variable up.
func getEnv(env []string, key string) (string, bool) {
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, key+"="); ok {
			return value, true
		}
	}
	return "", false
}
