package chat

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The methods of Python's values that templates call.
var (
	textMethods = map[string]func(f *frame, s string, a *arguments) (value, error){
		"strip":      func(_ *frame, s string, a *arguments) (value, error) { return strip(s, a, true, true), nil },
		"lstrip":     func(_ *frame, s string, a *arguments) (value, error) { return strip(s, a, true, false), nil },
		"rstrip":     func(_ *frame, s string, a *arguments) (value, error) { return strip(s, a, false, true), nil },
		"upper":      textMethod(strings.ToUpper),
		"lower":      textMethod(strings.ToLower),
		"title":      textMethod(title),
		"capitalize": textMethod(capitalize),
		"startswith": prefixMethod(strings.HasPrefix),
		"endswith":   prefixMethod(strings.HasSuffix),
		"replace":    replace,
		"split":      split,
		"splitlines": func(f *frame, s string, _ *arguments) (value, error) {
			return texts(f, strings.Split(strings.TrimSuffix(s, "\n"), "\n"))
		},
		"join": func(f *frame, s string, a *arguments) (value, error) {
			return join(f, a.at(0, "iterable"), &arguments{list: []value{s}})
		},
		"find": func(_ *frame, s string, a *arguments) (value, error) {
			what, ok := a.at(0, "sub").(string)
			if !ok {
				return nil, errors.New("find wants a text")
			}
			n := strings.Index(s, what)
			if n < 0 {
				return int64(-1), nil
			}
			return int64(utf8.RuneCountInString(s[:n])), nil
		},
		"count": func(_ *frame, s string, a *arguments) (value, error) {
			what, ok := a.at(0, "sub").(string)
			if !ok {
				return nil, errors.New("count wants a text")
			}
			return int64(strings.Count(s, what)), nil
		},
		"isdigit": func(_ *frame, s string, _ *arguments) (value, error) {
			return s != "" && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsDigit(r) }) < 0, nil
		},
	}
	dictMethods = map[string]func(f *frame, d *dict, a *arguments) (value, error){
		"items": func(f *frame, d *dict, a *arguments) (value, error) { return items(f, d, a) },
		"keys":  func(f *frame, d *dict, _ *arguments) (value, error) { return &list{items: keysOf(d)}, nil },
		"values": func(_ *frame, d *dict, _ *arguments) (value, error) {
			out := &list{}
			for _, k := range d.keys {
				out.items = append(out.items, d.values[k])
			}
			return out, nil
		},
		"get": func(_ *frame, d *dict, a *arguments) (value, error) {
			key, _ := a.at(0, "key").(string)
			if v, ok := d.values[key]; ok {
				return v, nil
			}
			if v := a.at(1, "default"); v != (undefined{"default"}) {
				return v, nil
			}
			return nil, nil
		},
	}
	listMethods = map[string]func(f *frame, l *list, a *arguments) (value, error){
		"index": func(_ *frame, l *list, a *arguments) (value, error) {
			for i, x := range l.items {
				if equal(x, a.at(0, "value")) {
					return int64(i), nil
				}
			}
			return nil, fmt.Errorf("%s is not in the list", repr(a.at(0, "value")))
		},
		"append": func(*frame, *list, *arguments) (value, error) {
			return nil, errors.New("a template must not change a list") // as Hugging Face's sandbox has it
		},
	}
)

func textMethod(change func(string) string) func(*frame, string, *arguments) (value, error) {
	return func(f *frame, s string, _ *arguments) (value, error) {
		s = change(s)
		return s, f.budget.take(len(s))
	}
}

// prefixMethod is startswith or endswith, of one text or of any of several.
func prefixMethod(has func(s, part string) bool) func(*frame, string, *arguments) (value, error) {
	return func(_ *frame, s string, a *arguments) (value, error) {
		switch part := a.at(0, "prefix").(type) {
		case string:
			return has(s, part), nil
		case *list:
			for _, x := range part.items {
				if p, ok := x.(string); ok && has(s, p) {
					return true, nil
				}
			}
			return false, nil
		}
		return nil, errors.New("startswith and endswith want a text")
	}
}

// strip removes white space, or the characters of the argument, from the ends.
func strip(s string, a *arguments, left, right bool) string {
	drop := unicode.IsSpace
	if set, ok := a.at(0, "chars").(string); ok {
		drop = func(r rune) bool { return strings.ContainsRune(set, r) }
	}
	if left {
		s = strings.TrimLeftFunc(s, drop)
	}
	if right {
		s = strings.TrimRightFunc(s, drop)
	}
	return s
}

func split(f *frame, s string, a *arguments) (value, error) {
	most := -1
	if n, ok := a.at(1, "maxsplit").(int64); ok && n >= 0 {
		most = int(min(n, maxMemory)) + 1
	}
	sep, ok := a.at(0, "sep").(string)
	if !ok {
		if most >= 0 {
			return nil, fmt.Errorf("%w: split at white space with a limit", errors.ErrUnsupported)
		}
		return texts(f, strings.Fields(s))
	}
	if sep == "" {
		return nil, errors.New("split at nothing")
	}
	return texts(f, strings.SplitN(s, sep, most))
}

func texts(f *frame, parts []string) (value, error) {
	l := &list{items: make([]value, len(parts))}
	for i, p := range parts {
		l.items[i] = p
	}
	return l, f.budget.take(32 * len(parts))
}
