package grammar

// JSON is the form of any JSON object, as OpenAI's json_object has it.
func JSON() (*Grammar, error) {
	b := newBuilder()
	b.rules[0] = rule{{ref(b.anyObject())}}
	if b.err != nil {
		return nil, b.err
	}
	return finish(b.rules)
}

// anyValue is any JSON value.
func (b *builder) anyValue() int {
	return b.once("value", func() [][]element {
		return [][]element{
			{ref(b.anyObject())}, {ref(b.anyArray())}, {ref(b.anyString())}, {ref(b.number())},
			text("true"), text("false"), text("null"),
		}
	})
}

func (b *builder) anyObject() int {
	return b.once("object", func() [][]element {
		return [][]element{b.between('{', b.repeat(ref(b.member(b.anyString(), b.anyValue())), b.comma(), 0, -1), '}')}
	})
}

func (b *builder) anyArray() int {
	return b.once("array", func() [][]element {
		return [][]element{b.between('[', b.repeat(ref(b.anyValue()), b.comma(), 0, -1), ']')}
	})
}

func (b *builder) anyString() int {
	return b.once("string", func() [][]element {
		return [][]element{{one('"'), ref(b.repeat(ref(b.char()), nil, 0, -1)), one('"')}}
	})
}

func (b *builder) integer() int {
	return b.once("integer", func() [][]element {
		more := b.repeat(bytesOf(span('0', '9')), nil, 0, 17)
		sign := b.add(nil, text("-"))
		return [][]element{{ref(sign), one('0')}, {ref(sign), bytesOf(span('1', '9')), ref(more)}}
	})
}

func (b *builder) number() int {
	return b.once("number", func() [][]element {
		digits := b.repeat(bytesOf(span('0', '9')), nil, 1, 17)
		fraction := b.add(nil, []element{one('.'), ref(digits)})
		var e, sign class
		e.add('e')
		e.add('E')
		sign.add('+')
		sign.add('-')
		short := b.repeat(bytesOf(span('0', '9')), nil, 1, 3)
		exponent := b.add(nil, []element{bytesOf(e), ref(b.add(nil, []element{bytesOf(sign)})), ref(short)})
		return [][]element{{ref(b.integer()), ref(fraction), ref(exponent)}}
	})
}

func (b *builder) boolean() int {
	return b.once("boolean", func() [][]element { return [][]element{text("true"), text("false")} })
}

func (b *builder) comma() []element { return []element{one(','), ref(b.space())} }

// member is a key and its value.
func (b *builder) member(key, value int) int {
	return b.add([]element{ref(key), one(':'), ref(b.space()), ref(value)})
}

// between puts space and brackets around a rule.
func (b *builder) between(left byte, inner int, right byte) []element {
	sp := ref(b.space())
	return []element{one(left), sp, ref(inner), sp, one(right)}
}
