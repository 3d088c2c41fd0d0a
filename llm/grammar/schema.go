package grammar

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// maxSchema bounds how deep a schema may nest, and maxProperties how many
// properties one object may have: optional ones cost the square of their number.
const (
	maxSchema     = 64
	maxProperties = 256
)

// Schema is the form that a JSON Schema describes, with the properties of objects
// in the order in which the schema lists them. What cannot be enforced (such as
// multipleOf) is refused when strict, and otherwise ignored. It fails with
// Invalid.
func Schema(schema json.RawMessage, strict bool) (*Grammar, error) {
	const op = "grammar.Schema"
	dec := json.NewDecoder(bytes.NewReader(schema))
	dec.UseNumber()
	root, err := decode(dec, 0)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	if dec.More() {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "something follows the schema")
	}
	b := newBuilder()
	b.strict, b.root = strict, root
	b.rules[0] = rule{{ref(b.schema(root))}}
	if b.err != nil {
		return nil, b.err
	}
	return finish(b.rules)
}

// value is a JSON value whose objects keep their order. Numbers are json.Number,
// arrays []value, objects object; the rest is as encoding/json has it.
type value any

type member struct {
	key string
	val value
}

type object []member

func (o object) get(key string) value {
	for _, m := range o {
		if m.key == key {
			return m.val
		}
	}
	return nil
}

func decode(dec *json.Decoder, depth int) (value, error) {
	if depth > maxSchema {
		return nil, fmt.Errorf("nested deeper than %d", maxSchema)
	}
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if delim == '[' {
		list := []value{}
		for dec.More() {
			v, err := decode(dec, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = dec.Token()
		return list, err
	}
	obj := object{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		v, err := decode(dec, depth+1)
		if err != nil {
			return nil, err
		}
		obj = append(obj, member{key.(string), v}) // a decoder lets only strings be keys
	}
	_, err = dec.Token()
	return obj, err
}

// encode writes a value as compact JSON, which is how constants are matched.
func encode(v value) string {
	switch v := v.(type) {
	case object:
		parts := make([]string, len(v))
		for i, m := range v {
			parts[i] = encode(m.key) + ":" + encode(m.val)
		}
		return "{" + strings.Join(parts, ",") + "}"
	case []value:
		parts := make([]string, len(v))
		for i, e := range v {
			parts[i] = encode(e)
		}
		return "[" + strings.Join(parts, ",") + "]"
	case string:
		var out bytes.Buffer
		enc := json.NewEncoder(&out)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(v) // a string can always be encoded, into memory
		return strings.TrimSuffix(out.String(), "\n")
	}
	out, _ := json.Marshal(v) // a number, a boolean or null
	return string(out)
}

// enforced are the keywords that the compiler knows, and annotations that ask for
// nothing.
var enforced = strings.Fields(`type properties required additionalProperties items prefixItems minItems maxItems enum const
	anyOf oneOf allOf $ref $defs definitions minLength maxLength
	title description default examples $schema $id $comment deprecated readOnly writeOnly strict`)

func (b *builder) schema(v value) int {
	if b.err != nil {
		return 0
	}
	if b.depth++; b.depth > maxSchema {
		return b.fail("nested deeper than %d", maxSchema)
	}
	defer func() { b.depth-- }()
	if v == true || v == nil {
		return b.anyValue()
	}
	s, ok := v.(object)
	if !ok {
		return b.fail("a schema is an object or true, not %s", encode(v))
	}
	if b.strict {
		for _, m := range s {
			if !slices.Contains(enforced, m.key) {
				return b.fail("%q is not supported in a strict schema", m.key)
			}
		}
	}
	switch {
	case s.get("$ref") != nil:
		return b.reference(s.get("$ref"))
	case s.get("const") != nil:
		return b.text(encode(s.get("const")))
	case s.get("enum") != nil:
		list, _ := s.get("enum").([]value)
		return b.choice(list, func(v value) int { return b.text(encode(v)) })
	case s.get("anyOf") != nil:
		list, _ := s.get("anyOf").([]value)
		return b.choice(list, b.schema)
	case s.get("oneOf") != nil:
		list, _ := s.get("oneOf").([]value)
		return b.choice(list, b.schema)
	case s.get("allOf") != nil:
		return b.allOf(s)
	}
	return b.typed(s)
}

func (b *builder) choice(list []value, make func(value) int) int {
	if len(list) == 0 {
		return b.fail("a choice of nothing")
	}
	alts := [][]element{}
	for _, v := range list {
		alts = append(alts, []element{ref(make(v))})
	}
	return b.add(alts...)
}

// allOf merges the parts, as far as they are objects that each list properties.
func (b *builder) allOf(s object) int {
	parts, _ := s.get("allOf").([]value)
	if len(parts) == 1 {
		return b.schema(parts[0])
	}
	var properties object
	var required []value
	for _, part := range append(parts, s) {
		p, ok := part.(object)
		if r, isRef := p.get("$ref").(string); ok && isRef {
			p, ok = b.lookup(r).(object)
		}
		if !ok {
			return b.fail("allOf is supported for objects with properties")
		}
		if props, ok := p.get("properties").(object); ok {
			properties = append(properties, props...)
		}
		if req, ok := p.get("required").([]value); ok {
			required = append(required, req...)
		}
	}
	if len(properties) == 0 {
		return b.fail("allOf is supported for objects with properties")
	}
	return b.object(object{{"properties", properties}, {"required", required}, {"additionalProperties", false}})
}

// reference compiles what a $ref points to, once, so that a schema may contain
// itself.
func (b *builder) reference(v value) int {
	path, _ := v.(string)
	target := b.lookup(path)
	if target == nil {
		return b.fail("there is no %s in the schema", encode(v))
	}
	return b.once("#"+path, func() [][]element { return [][]element{{ref(b.schema(target))}} })
}

func (b *builder) lookup(path string) value {
	rest, ok := strings.CutPrefix(path, "#")
	if !ok {
		return nil
	}
	at := b.root
	for _, name := range strings.Split(rest, "/")[1:] {
		obj, ok := at.(object)
		if !ok {
			return nil
		}
		at = obj.get(strings.NewReplacer("~1", "/", "~0", "~").Replace(name))
	}
	return at
}

func (b *builder) typed(s object) int {
	switch t := s.get("type").(type) {
	case []value:
		return b.choice(t, func(one value) int {
			narrowed := slices.Clone(s)
			for i := range narrowed {
				if narrowed[i].key == "type" {
					narrowed[i].val = one
				}
			}
			return b.schema(narrowed)
		})
	case nil:
		if s.get("properties") != nil {
			return b.object(s)
		}
		return b.anyValue()
	case string:
		switch t {
		case "object":
			return b.object(s)
		case "array":
			return b.array(s)
		case "string":
			low, high := b.bounds(s, "minLength", "maxLength")
			if low == 0 && high < 0 {
				return b.anyString()
			}
			return b.add([]element{one('"'), ref(b.repeat(ref(b.char()), nil, low, high)), one('"')})
		case "number":
			return b.number()
		case "integer":
			return b.integer()
		case "boolean":
			return b.boolean()
		case "null":
			return b.text("null")
		}
	}
	return b.fail("there is no type %s", encode(s.get("type")))
}

// bounds reads two counts; the second is -1 when there is none.
func (b *builder) bounds(s object, low, high string) (from, to int) {
	read := func(key string, absent int) int {
		v := s.get(key)
		if v == nil {
			return absent
		}
		number, _ := v.(json.Number)
		n, err := number.Int64()
		if err != nil || n < 0 || n > maxRepeat {
			return b.fail("%s must be a number from 0 to %d", key, maxRepeat)
		}
		return int(n)
	}
	return read(low, 0), read(high, -1)
}

func (b *builder) array(s object) int {
	low, high := b.bounds(s, "minItems", "maxItems")
	if fixed, ok := s.get("prefixItems").([]value); ok && len(fixed) > 0 {
		var seq []element
		for i, item := range fixed {
			if i > 0 {
				seq = append(seq, b.comma()...)
			}
			seq = append(seq, ref(b.schema(item)))
		}
		return b.add(b.between('[', b.add(seq), ']'))
	}
	return b.add(b.between('[', b.repeat(ref(b.schema(s.get("items"))), b.comma(), low, high), ']'))
}

// object matches the properties in their order; those that are not required may
// be left out. Others are allowed where the schema says so, and where it lists
// none at all.
func (b *builder) object(s object) int {
	properties, _ := s.get("properties").(object)
	extra := s.get("additionalProperties")
	if len(properties) == 0 && (extra == nil || extra == true) {
		return b.anyObject()
	}
	if len(properties) > maxProperties {
		return b.fail("an object of more than %d properties", maxProperties)
	}
	required, _ := s.get("required").([]value)
	members := make([]element, len(properties))
	must := make([]bool, len(properties))
	for i, p := range properties {
		members[i] = ref(b.member(b.text(encode(p.key)), b.schema(p.val)))
		must[i] = slices.Contains(required, value(p.key))
	}
	var others []element // what may stand after the last property
	if extra != nil && extra != false {
		others = []element{ref(b.member(b.anyString(), b.schema(extra)))}
	}
	return b.add(b.between('{', b.members(members, must, others), '}'))
}

// members builds, from the end, what may follow once the first i properties are
// dealt with: begin when none has been written yet, after when one has.
func (b *builder) members(members []element, must []bool, others []element) int {
	n := len(members)
	begin, after := make([]int, n+1), make([]int, n+1)
	begin[n], after[n] = b.add(nil), b.add(nil)
	if others != nil {
		begin[n] = b.repeat(others[0], b.comma(), 0, -1)
		more := b.add()
		b.rules[more] = rule{nil, append(b.comma(), others[0], ref(more))}
		after[n] = more
	}
	for i := n - 1; i >= 0; i-- {
		write := []element{members[i], ref(after[i+1])}
		alts, altsAfter := [][]element{write}, [][]element{append(b.comma(), write...)}
		if !must[i] {
			alts, altsAfter = append(alts, []element{ref(begin[i+1])}), append(altsAfter, []element{ref(after[i+1])})
		}
		begin[i], after[i] = b.add(alts...), b.add(altsAfter...)
	}
	return begin[0]
}
