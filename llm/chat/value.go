package chat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// A value is what a template computes with: nil (None), bool, int64, float64,
// string, *list, *dict, *namespace, function, or undefined.
type value any

// A list is a tuple too, which only prints differently.
type list struct {
	items []value
	tuple bool
}

// A dict keeps the order in which keys were set.
type dict struct {
	keys   []string
	values map[string]value
}

func (d *dict) set(key string, v value) {
	if d.values == nil {
		d.values = map[string]value{}
	}
	if _, ok := d.values[key]; !ok {
		d.keys = append(d.keys, key)
	}
	d.values[key] = v
}

// A namespace is the one thing that a template may change.
type namespace struct{ dict }

type function func(f *frame, a *arguments) (value, error)

// undefined is what a name or an attribute is that does not exist.
type undefined struct{ name string }

// arguments are those of a call.
type arguments struct {
	list  []value
	named map[string]value
}

// at returns an argument by place or by name; undefined if it was not given.
func (a *arguments) at(i int, name string) value {
	if i < len(a.list) {
		return a.list[i]
	}
	if v, ok := a.named[name]; ok {
		return v
	}
	return undefined{name}
}

func truth(v value) bool {
	switch v := v.(type) {
	case nil, undefined:
		return false
	case bool:
		return v
	case int64:
		return v != 0
	case float64:
		return v != 0
	case string:
		return v != ""
	case *list:
		return len(v.items) > 0
	case *dict:
		return len(v.keys) > 0
	}
	return true
}

func number(v value) (float64, bool) {
	switch v := v.(type) {
	case int64:
		return float64(v), true
	case float64:
		return v, true
	case bool:
		if v {
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

func equal(a, b value) bool {
	left := 1 << 20 // comparisons; lists that hold each other many times have more
	return equalWithin(a, b, &left)
}

func equalWithin(a, b value, left *int) bool {
	if *left--; *left < 0 {
		return false
	}
	if x, ok := number(a); ok {
		y, ok := number(b)
		return ok && x == y
	}
	switch a := a.(type) {
	case nil:
		return b == nil
	case string:
		s, ok := b.(string)
		return ok && a == s
	case undefined:
		_, ok := b.(undefined)
		return ok
	case *list:
		c, ok := b.(*list)
		return ok && slices.EqualFunc(a.items, c.items, func(x, y value) bool { return equalWithin(x, y, left) })
	case *dict:
		c, ok := b.(*dict)
		if !ok || len(a.keys) != len(c.keys) {
			return false
		}
		for _, k := range a.keys {
			w, ok := c.values[k]
			if !ok || !equalWithin(a.values[k], w, left) {
				return false
			}
		}
		return true
	}
	return false
}

// order compares numbers with numbers and text with text.
func order(a, b value) (int, error) {
	x, okX := number(a)
	y, okY := number(b)
	if okX && okY {
		switch {
		case x < y:
			return -1, nil
		case x > y:
			return 1, nil
		}
		return 0, nil
	}
	s, okS := a.(string)
	t, okT := b.(string)
	if okS && okT {
		return strings.Compare(s, t), nil
	}
	return 0, fmt.Errorf("%s and %s have no order", kind(a), kind(b))
}

// kind names the type of a value as Python does.
func kind(v value) string {
	switch v.(type) {
	case nil:
		return "None"
	case undefined:
		return "an undefined value"
	case bool:
		return "a bool"
	case int64:
		return "an int"
	case float64:
		return "a float"
	case string:
		return "a str"
	case *list:
		return "a list"
	case *dict:
		return "a dict"
	}
	return "an object"
}

// toString is Python's str.
func toString(v value) string {
	switch v := v.(type) {
	case string:
		return v
	case undefined:
		return ""
	}
	return repr(v)
}

// repr is Python's repr. It stops when the text is longer than a template may make.
func repr(v value) string {
	var b strings.Builder
	writeRepr(&b, v)
	return b.String()
}

func writeRepr(b *strings.Builder, v value) {
	if b.Len() > maxMemory {
		return
	}
	switch v := v.(type) {
	case nil:
		b.WriteString("None")
	case bool:
		b.WriteString(map[bool]string{true: "True", false: "False"}[v])
	case int64:
		b.WriteString(strconv.FormatInt(v, 10))
	case float64:
		b.WriteString(float(v))
	case string:
		b.WriteString(quote(v))
	case undefined:
		b.WriteString("Undefined")
	case *list:
		brackets := "[]"
		if v.tuple {
			brackets = "()"
		}
		b.WriteByte(brackets[0])
		for i, x := range v.items {
			if i > 0 {
				b.WriteString(", ")
			}
			writeRepr(b, x)
		}
		if v.tuple && len(v.items) == 1 {
			b.WriteByte(',')
		}
		b.WriteByte(brackets[1])
	case *dict:
		b.WriteByte('{')
		for i, k := range v.keys {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(quote(k) + ": ")
			writeRepr(b, v.values[k])
		}
		b.WriteByte('}')
	default:
		b.WriteString("<object>")
	}
}

func float(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "inf"
	case math.IsInf(v, -1):
		return "-inf"
	case math.IsNaN(v):
		return "nan"
	}
	if v == math.Trunc(v) && math.Abs(v) < 1e16 {
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	if a := math.Abs(v); a >= 1e16 || a < 1e-4 {
		return strconv.FormatFloat(v, 'e', -1, 64)
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

func quote(s string) string {
	q := "'"
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		q = `"`
	}
	s = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`).Replace(s)
	if q == "'" {
		s = strings.ReplaceAll(s, "'", `\'`)
	}
	return q + s + q
}

// toJSON writes a value as Python's json.dumps does, without escaping what is not
// ASCII. indent is the spaces of a level; negative for one line.
func toJSON(b *bytes.Buffer, v value, indent, level int) error {
	if level > maxDepth || b.Len() > maxMemory {
		return errors.New("too many values in each other")
	}
	switch v := v.(type) {
	case nil:
		b.WriteString("null")
	case bool:
		b.WriteString(strconv.FormatBool(v))
	case int64, float64:
		b.WriteString(repr(v))
	case string:
		jsonString(b, v)
	case *list:
		return jsonItems(b, '[', ']', len(v.items), indent, level, func(i int) error {
			return toJSON(b, v.items[i], indent, level+1)
		})
	case *dict:
		return jsonItems(b, '{', '}', len(v.keys), indent, level, func(i int) error {
			jsonString(b, v.keys[i])
			b.WriteString(": ")
			return toJSON(b, v.values[v.keys[i]], indent, level+1)
		})
	default:
		return fmt.Errorf("%s cannot be written as JSON", kind(v))
	}
	return nil
}

func jsonItems(b *bytes.Buffer, open, end byte, n, indent, level int, item func(int) error) error {
	b.WriteByte(open)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
			if indent < 0 {
				b.WriteByte(' ')
			}
		}
		if indent >= 0 {
			b.WriteString("\n" + strings.Repeat(" ", indent*(level+1)))
		}
		if err := item(i); err != nil {
			return err
		}
	}
	if n > 0 && indent >= 0 {
		b.WriteString("\n" + strings.Repeat(" ", indent*level))
	}
	b.WriteByte(end)
	return nil
}

func jsonString(b *bytes.Buffer, s string) {
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\b':
			b.WriteString(`\b`)
		case r == '\f':
			b.WriteString(`\f`)
		case r < ' ':
			fmt.Fprintf(b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
}

// decodeJSON reads JSON into values; nothing at all is None.
func decodeJSON(raw []byte) (value, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	v, err := decodeValue(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more after the end of the JSON")
	}
	return v, nil
}

func decodeValue(d *json.Decoder, depth int) (value, error) {
	if depth > maxDepth {
		return nil, errors.New("too many values in each other")
	}
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch t := token.(type) {
	case json.Number:
		if n, err := t.Int64(); err == nil {
			return n, nil
		}
		return t.Float64()
	case json.Delim:
		if t == '[' {
			l := &list{}
			for d.More() {
				v, err := decodeValue(d, depth+1)
				if err != nil {
					return nil, err
				}
				l.items = append(l.items, v)
			}
			_, err := d.Token()
			return l, err
		}
		o := &dict{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			v, err := decodeValue(d, depth+1)
			if err != nil {
				return nil, err
			}
			o.set(key.(string), v) // the decoder lets only text be a key
		}
		_, err := d.Token()
		return o, err
	}
	return token, nil // text, bool or nil
}
