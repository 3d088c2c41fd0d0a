package chat

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// tests are what may follow "is". The second value is their argument.
var tests = map[string]func(v, arg value) (bool, error){
	"defined":   func(v, _ value) (bool, error) { _, un := v.(undefined); return !un, nil },
	"undefined": func(v, _ value) (bool, error) { _, un := v.(undefined); return un, nil },
	"none":      func(v, _ value) (bool, error) { return v == nil, nil },
	"string":    func(v, _ value) (bool, error) { _, ok := v.(string); return ok, nil },
	"boolean":   func(v, _ value) (bool, error) { _, ok := v.(bool); return ok, nil },
	"integer":   func(v, _ value) (bool, error) { _, ok := v.(int64); return ok, nil },
	"float":     func(v, _ value) (bool, error) { _, ok := v.(float64); return ok, nil },
	"number":    func(v, _ value) (bool, error) { _, ok := number(v); return ok, nil },
	"mapping":   func(v, _ value) (bool, error) { _, ok := v.(*dict); return ok, nil },
	"sequence":  isSequence,
	"iterable":  isSequence,
	"callable":  func(v, _ value) (bool, error) { _, ok := v.(function); return ok, nil },
	"true":      func(v, _ value) (bool, error) { return v == true, nil },
	"false":     func(v, _ value) (bool, error) { return v == false, nil },
	"equalto":   func(v, arg value) (bool, error) { return equal(v, arg), nil },
	"eq":        func(v, arg value) (bool, error) { return equal(v, arg), nil },
	"ne":        func(v, arg value) (bool, error) { return !equal(v, arg), nil },
	"in":        func(v, arg value) (bool, error) { return contains(arg, v) },
	"odd":       func(v, _ value) (bool, error) { return divisible(v, int64(2), true) },
	"even":      func(v, _ value) (bool, error) { return divisible(v, int64(2), false) },
	"divisibleby": func(v, arg value) (bool, error) {
		return divisible(v, arg, false)
	},
	"lower": func(v, _ value) (bool, error) { s, ok := v.(string); return ok && s == strings.ToLower(s), nil },
	"upper": func(v, _ value) (bool, error) { s, ok := v.(string); return ok && s == strings.ToUpper(s), nil },
}

// testWithArgument are tests whose argument may be a name without brackets.
var testWithArgument = map[string]bool{"equalto": true, "eq": true, "ne": true, "in": true, "divisibleby": true}

func isSequence(v, _ value) (bool, error) {
	switch v.(type) {
	case string, *list, *dict:
		return true, nil
	}
	return false, nil
}

func divisible(v, by value, negated bool) (bool, error) {
	n, okN := v.(int64)
	m, okM := by.(int64)
	if !okN || !okM || m == 0 {
		return false, fmt.Errorf("%s is not a number to divide", kind(v))
	}
	return (n%m == 0) != negated, nil
}

type filterFunc func(f *frame, v value, a *arguments) (value, error)

// filters are what may follow "|". A filter that looks others up does so through its
// frame.
var filters = map[string]filterFunc{
	"trim":       func(_ *frame, v value, a *arguments) (value, error) { return strip(toString(v), a, true, true), nil },
	"upper":      onText(strings.ToUpper),
	"lower":      onText(strings.ToLower),
	"title":      onText(title),
	"capitalize": onText(capitalize),
	"string":     onText(func(s string) string { return s }),
	"safe":       func(_ *frame, v value, _ *arguments) (value, error) { return v, nil },
	"escape":     onText(html.EscapeString),
	"e":          onText(html.EscapeString),
	"length":     length,
	"count":      length,
	"tojson":     tojson,
	"join":       join,
	"default":    fallback,
	"d":          fallback,
	"first":      func(_ *frame, v value, _ *arguments) (value, error) { return index(v, int64(0)) },
	"last":       func(_ *frame, v value, _ *arguments) (value, error) { return index(v, int64(-1)) },
	"list":       toList,
	"int":        toInt,
	"float":      toFloat,
	"abs":        absolute,
	"replace":    func(f *frame, v value, a *arguments) (value, error) { return replace(f, toString(v), a) },
	"items":      items,
	"dictsort":   dictsort,
	"reverse":    reverse,
	"sort":       sorted,
	"unique":     unique,
	"indent":     indent,
	"map":        mapped,
	"select":     choose(false, true),
	"reject":     choose(false, false),
	"selectattr": choose(true, true),
	"rejectattr": choose(true, false),
}

func onText(change func(string) string) filterFunc {
	return func(f *frame, v value, _ *arguments) (value, error) {
		s := change(toString(v))
		return s, f.budget.take(len(s))
	}
}

func title(s string) string {
	word := false
	return strings.Map(func(r rune) rune {
		was := word
		word = unicode.IsLetter(r) || unicode.IsDigit(r) || r == '\''
		if was {
			return unicode.ToLower(r)
		}
		return unicode.ToUpper(r)
	}, s)
}

func capitalize(s string) string {
	_, n := utf8.DecodeRuneInString(s)
	return strings.ToUpper(s[:n]) + strings.ToLower(s[n:])
}

func length(_ *frame, v value, _ *arguments) (value, error) {
	switch v := v.(type) {
	case string:
		return int64(utf8.RuneCountInString(v)), nil
	case *list:
		return int64(len(v.items)), nil
	case *dict:
		return int64(len(v.keys)), nil
	case undefined:
		return int64(0), nil
	}
	return nil, fmt.Errorf("%s has no length", kind(v))
}

func tojson(f *frame, v value, a *arguments) (value, error) {
	width := int64(-1)
	if n, ok := a.at(0, "indent").(int64); ok {
		width = min(n, 16)
	}
	var b bytes.Buffer
	if err := toJSON(&b, v, int(width), 0); err != nil {
		return nil, err
	}
	return b.String(), f.budget.take(b.Len())
}

func join(f *frame, v value, a *arguments) (value, error) {
	all, err := elements(v)
	if err != nil {
		return nil, err
	}
	between := ""
	if s, ok := a.at(0, "d").(string); ok {
		between = s
	}
	name, byAttribute := a.at(1, "attribute").(string)
	parts := make([]string, len(all))
	for i, x := range all {
		if byAttribute {
			if x, err = index(x, name); err != nil {
				return nil, err
			}
		}
		parts[i] = toString(x)
		if err := f.budget.take(len(parts[i]) + len(between)); err != nil {
			return nil, err
		}
	}
	return strings.Join(parts, between), nil
}

func fallback(_ *frame, v value, a *arguments) (value, error) {
	_, missing := v.(undefined)
	if missing || truth(a.at(1, "boolean")) && !truth(v) {
		if d := a.at(0, "default_value"); d != (undefined{"default_value"}) {
			return d, nil
		}
		return "", nil
	}
	return v, nil
}

func toList(f *frame, v value, _ *arguments) (value, error) {
	all, err := elements(v)
	return &list{items: slices.Clone(all)}, errors.Join(err, f.budget.take(16*len(all)))
}

func toInt(_ *frame, v value, a *arguments) (value, error) {
	if s, ok := v.(string); ok {
		if n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64); err == nil {
			return n, nil
		}
		x, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
		if err == nil {
			return int64(x), nil
		}
	} else if x, ok := number(v); ok {
		return int64(x), nil
	}
	if d, ok := a.at(0, "default").(int64); ok {
		return d, nil
	}
	return int64(0), nil
}

func toFloat(_ *frame, v value, _ *arguments) (value, error) {
	if s, ok := v.(string); ok {
		if x, err := strconv.ParseFloat(strings.TrimSpace(s), 64); err == nil {
			return x, nil
		}
		return 0.0, nil
	}
	x, _ := number(v)
	return x, nil
}

func absolute(_ *frame, v value, _ *arguments) (value, error) {
	if n, ok := v.(int64); ok {
		return max(n, -n), nil
	}
	x, ok := number(v)
	if !ok {
		return nil, fmt.Errorf("%s has no absolute value", kind(v))
	}
	return math.Abs(x), nil
}

func replace(f *frame, s string, a *arguments) (value, error) {
	old, okOld := a.at(0, "s").(string)
	now, okNow := a.at(1, "new").(string)
	if !okOld || !okNow {
		return nil, errors.New("replace wants two texts")
	}
	n := int64(-1)
	if c, ok := a.at(2, "count").(int64); ok {
		n = c
	}
	if err := f.budget.take(len(s) + (strings.Count(s, old)+1)*len(now)); err != nil {
		return nil, err
	}
	return strings.Replace(s, old, now, int(n)), nil
}

func items(f *frame, v value, _ *arguments) (value, error) {
	switch v := v.(type) {
	case *dict:
		return pairsOf(v), f.budget.take(64 * len(v.keys))
	case undefined:
		return &list{}, nil
	}
	return nil, fmt.Errorf("%s has no items", kind(v))
}

func dictsort(f *frame, v value, a *arguments) (value, error) {
	all, err := items(f, v, a)
	if err != nil {
		return nil, err
	}
	pairs := all.(*list)
	slices.SortStableFunc(pairs.items, func(a, b value) int {
		x, y := a.(*list).items[0].(string), b.(*list).items[0].(string)
		return strings.Compare(strings.ToLower(x), strings.ToLower(y))
	})
	return pairs, nil
}

func reverse(f *frame, v value, _ *arguments) (value, error) {
	all, err := elements(v)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(all)
	slices.Reverse(out)
	if _, ok := v.(string); ok {
		return join(f, &list{items: out}, &arguments{})
	}
	return &list{items: out}, f.budget.take(16 * len(out))
}

func sorted(f *frame, v value, a *arguments) (value, error) {
	all, err := elements(v)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(all)
	name, byAttribute := a.at(2, "attribute").(string)
	slices.SortStableFunc(out, func(x, y value) int {
		if byAttribute {
			var errX, errY error
			x, errX = index(x, name)
			y, errY = index(y, name)
			err = errors.Join(err, errX, errY)
		}
		s, okS := x.(string)
		t, okT := y.(string)
		if okS && okT {
			x, y = strings.ToLower(s), strings.ToLower(t)
		}
		n, e := order(x, y)
		if e != nil {
			err = e
		}
		return n
	})
	if truth(a.at(0, "reverse")) {
		slices.Reverse(out)
	}
	return &list{items: out}, errors.Join(err, f.budget.take(16*len(out)))
}

func unique(f *frame, v value, _ *arguments) (value, error) {
	all, err := elements(v)
	if err != nil {
		return nil, err
	}
	out := &list{}
	for _, x := range all {
		for range out.items {
			if err := f.budget.step(); err != nil {
				return nil, err
			}
		}
		if !slices.ContainsFunc(out.items, func(y value) bool { return equal(x, y) }) {
			out.items = append(out.items, x)
		}
	}
	return out, nil
}

func indent(f *frame, v value, a *arguments) (value, error) {
	pad := "    "
	switch n := a.at(0, "width").(type) {
	case int64:
		pad = strings.Repeat(" ", int(min(max(n, 0), 64)))
	case string:
		pad = n
	}
	lines := strings.Split(toString(v), "\n")
	size := 0
	for i, line := range lines {
		if i == 0 && !truth(a.at(1, "first")) || line == "" && i > 0 && !truth(a.at(2, "blank")) {
			continue
		}
		lines[i] = pad + line
		size += len(lines[i])
	}
	return strings.Join(lines, "\n"), f.budget.take(size)
}

func mapped(f *frame, v value, a *arguments) (value, error) {
	all, err := elements(v)
	if err != nil {
		return nil, err
	}
	apply := func(x value) (value, error) {
		name, ok := a.named["attribute"].(string)
		if !ok {
			return nil, errors.New("map wants a filter or an attribute")
		}
		y, err := index(x, name)
		if _, missing := y.(undefined); missing {
			if d, ok := a.named["default"]; ok {
				return d, err
			}
		}
		return y, err
	}
	if len(a.list) > 0 {
		name, _ := a.list[0].(string)
		filter := f.filters[name]
		if filter == nil {
			return nil, fmt.Errorf("map by the filter %q, which is not known", name)
		}
		apply = func(x value) (value, error) { return filter(f, x, &arguments{list: a.list[1:], named: a.named}) }
	}
	out := &list{}
	for _, x := range all {
		if err := f.budget.step(); err != nil {
			return nil, err
		}
		y, err := apply(x)
		if err != nil {
			return nil, err
		}
		out.items = append(out.items, y)
	}
	return out, nil
}

// choose makes the filters that keep some elements: those, or those of which an
// attribute, pass a test or do not.
func choose(byAttribute, keep bool) filterFunc {
	return func(f *frame, v value, a *arguments) (value, error) {
		all, err := elements(v)
		if err != nil {
			return nil, err
		}
		args := a.list
		name := value(nil)
		if byAttribute {
			if len(args) == 0 {
				return nil, errors.New("an attribute is missing")
			}
			name, args = args[0], args[1:]
		}
		check := func(v, _ value) (bool, error) { return truth(v), nil }
		var arg value
		if len(args) > 0 {
			test, _ := args[0].(string)
			if check = tests[test]; check == nil {
				return nil, fmt.Errorf("the test %q is not known", test)
			}
			if len(args) > 1 {
				arg = args[1]
			}
		}
		out := &list{}
		for _, x := range all {
			if err := f.budget.step(); err != nil {
				return nil, err
			}
			y := x
			if byAttribute {
				if y, err = index(x, name); err != nil {
					return nil, err
				}
			}
			ok, err := check(y, arg)
			if err != nil {
				return nil, err
			}
			if ok == keep {
				out.items = append(out.items, x)
			}
		}
		return out, nil
	}
}
