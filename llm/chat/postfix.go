package chat

import (
	"errors"
	"fmt"
)

// postfix reads what belongs to a value: attributes, items and calls.
func (p *parser) postfix(e expression) (expression, error) {
	for {
		var err error
		switch {
		case p.op("."):
			var name string
			if name, err = p.name(); err != nil {
				return nil, err
			}
			e = attribute(e, name)
		case p.op("["):
			e, err = p.subscript(e)
		case p.op("("):
			e, err = p.call(e)
		default:
			return e, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// filtered reads what may follow that: filters and tests, and calls of their results.
func (p *parser) filtered(e expression) (expression, error) {
	for {
		var err error
		switch {
		case p.op("|"):
			e, err = p.filter(e)
		case p.word("is"):
			e, err = p.test(e)
		default:
			return e, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// attribute is e.name: a key of a dict, or else a method.
func attribute(e expression, name string) expression {
	return func(f *frame) (value, error) {
		v, err := e(f)
		if err != nil {
			return nil, err
		}
		switch v := v.(type) {
		case undefined:
			return nil, fmt.Errorf("%s is undefined, and has no %s", v.name, name)
		case *namespace:
			if x, ok := v.values[name]; ok {
				return x, nil
			}
			return undefined{name}, nil
		case *dict:
			// As Jinja, which asks for an attribute first: the methods of a dict hide keys.
			if m := dictMethods[name]; m != nil {
				return function(func(f *frame, a *arguments) (value, error) { return m(f, v, a) }), nil
			}
			if x, ok := v.values[name]; ok {
				return x, nil
			}
		case string:
			if m := textMethods[name]; m != nil {
				return function(func(f *frame, a *arguments) (value, error) { return m(f, v, a) }), nil
			}
		case *list:
			if m := listMethods[name]; m != nil {
				return function(func(f *frame, a *arguments) (value, error) { return m(f, v, a) }), nil
			}
		}
		return undefined{name}, nil
	}
}

// subscript reads the rest of e[index] or e[from:to:step].
func (p *parser) subscript(e expression) (expression, error) {
	var parts [3]expression
	n := 0
	for {
		if t := p.peek(); t.kind != tokOperator || t.text != ":" && t.text != "]" {
			var err error
			if parts[n], err = p.expression(); err != nil {
				return nil, err
			}
		}
		if p.op("]") {
			break
		}
		if n++; n > 2 {
			return nil, errors.New("too many colons in a slice")
		}
		if err := p.expectOp(":"); err != nil {
			return nil, err
		}
	}
	if n == 0 && parts[0] == nil {
		return nil, errors.New("an index is missing")
	}
	return func(f *frame) (value, error) {
		v, err := e(f)
		if err != nil {
			return nil, err
		}
		var at [3]value
		for i, part := range parts {
			if part == nil {
				continue
			}
			if at[i], err = part(f); err != nil {
				return nil, err
			}
		}
		if n == 0 {
			return index(v, at[0])
		}
		return slice(f, v, at)
	}, nil
}

func index(v, at value) (value, error) {
	switch v := v.(type) {
	case *dict:
		if s, ok := at.(string); ok {
			if x, ok := v.values[s]; ok {
				return x, nil
			}
		}
		return undefined{toString(at)}, nil
	case *namespace:
		return index(&v.dict, at)
	case undefined:
		return nil, fmt.Errorf("%s is undefined, and has no %s", v.name, repr(at))
	}
	i, ok := at.(int64)
	if !ok {
		return undefined{toString(at)}, nil
	}
	items, err := elements(v)
	if err != nil {
		return nil, err
	}
	if i < 0 {
		i += int64(len(items))
	}
	if i < 0 || i >= int64(len(items)) {
		return undefined{fmt.Sprintf("element %d", i)}, nil
	}
	return items[i], nil
}

// slice is Python's v[from:to:step].
func slice(f *frame, v value, at [3]value) (value, error) {
	items, err := elements(v)
	if err != nil {
		return nil, err
	}
	n := int64(len(items))
	step := int64(1)
	if s, ok := at[2].(int64); ok {
		step = s
	}
	if step == 0 {
		return nil, errors.New("a slice with steps of zero")
	}
	bound := func(v value, missing int64) int64 {
		i, ok := v.(int64)
		if !ok {
			return missing
		}
		if i < 0 {
			i += n
		}
		if step < 0 {
			return min(max(i, -1), n-1)
		}
		return min(max(i, 0), n)
	}
	from, to := bound(at[0], 0), bound(at[1], n)
	if step < 0 {
		from, to = bound(at[0], n-1), bound(at[1], -1)
	}
	out := &list{}
	for i := from; step > 0 && i < to || step < 0 && i > to; i += step {
		out.items = append(out.items, items[i])
	}
	if err := f.budget.take(16 * len(out.items)); err != nil {
		return nil, err
	}
	if _, ok := v.(string); ok {
		text := ""
		for _, r := range out.items {
			text += r.(string) // elements made them
		}
		return text, nil
	}
	return out, nil
}

// arguments reads those of a call, up to its bracket.
func (p *parser) arguments() (func(*frame) (*arguments, error), error) {
	type argument struct {
		name  string
		value expression
	}
	var all []argument
	for !p.op(")") {
		a := argument{}
		if p.peek().kind == tokName && p.tokens[1].kind == tokOperator && p.tokens[1].text == "=" {
			a.name = p.take().text
			p.take()
		}
		var err error
		if a.value, err = p.expression(); err != nil {
			return nil, err
		}
		all = append(all, a)
		if !p.op(",") && p.peek().text != ")" {
			return nil, fmt.Errorf("%q among arguments", p.peek().text)
		}
	}
	return func(f *frame) (*arguments, error) {
		out := &arguments{named: map[string]value{}}
		for _, a := range all {
			v, err := a.value(f)
			if err != nil {
				return nil, err
			}
			if a.name == "" {
				out.list = append(out.list, v)
			} else {
				out.named[a.name] = v
			}
		}
		return out, nil
	}, nil
}

func (p *parser) call(e expression) (expression, error) {
	args, err := p.arguments()
	if err != nil {
		return nil, err
	}
	return func(f *frame) (value, error) {
		v, err := e(f)
		if err != nil {
			return nil, err
		}
		fn, ok := v.(function)
		if !ok {
			if u, ok := v.(undefined); ok {
				return nil, fmt.Errorf("%s is undefined, and cannot be called", u.name)
			}
			return nil, fmt.Errorf("%s cannot be called", kind(v))
		}
		a, err := args(f)
		if err != nil {
			return nil, err
		}
		if err := f.budget.step(); err != nil {
			return nil, err
		}
		return fn(f, a)
	}, nil
}

func (p *parser) filter(e expression) (expression, error) {
	name, err := p.name()
	if err != nil {
		return nil, err
	}
	apply := filters[name]
	if apply == nil {
		return nil, fmt.Errorf("%w: the filter %q", errors.ErrUnsupported, name)
	}
	args := func(*frame) (*arguments, error) { return &arguments{}, nil }
	if p.op("(") {
		if args, err = p.arguments(); err != nil {
			return nil, err
		}
	}
	return func(f *frame) (value, error) {
		v, err := e(f)
		if err != nil {
			return nil, err
		}
		a, err := args(f)
		if err != nil {
			return nil, err
		}
		if err := f.budget.step(); err != nil {
			return nil, err
		}
		return apply(f, v, a)
	}, nil
}

func (p *parser) test(e expression) (expression, error) {
	negated := p.word("not")
	name, err := p.name()
	if err != nil {
		return nil, err
	}
	check := tests[name]
	if check == nil {
		return nil, fmt.Errorf("%w: the test %q", errors.ErrUnsupported, name)
	}
	args := func(*frame) (*arguments, error) { return &arguments{}, nil }
	switch t := p.peek(); {
	case p.op("("):
		if args, err = p.arguments(); err != nil {
			return nil, err
		}
	case t.kind == tokString || t.kind == tokInt || t.kind == tokOperator && t.text == "[" || t.kind == tokName && testWithArgument[name]:
		operand, err := p.primary()
		if err != nil {
			return nil, err
		}
		args = func(f *frame) (*arguments, error) {
			v, err := operand(f)
			return &arguments{list: []value{v}}, err
		}
	}
	return func(f *frame) (value, error) {
		v, err := e(f)
		if err != nil {
			return nil, err
		}
		a, err := args(f)
		if err != nil {
			return nil, err
		}
		ok, err := check(v, a.at(0, ""))
		return ok != negated, err
	}, nil
}
