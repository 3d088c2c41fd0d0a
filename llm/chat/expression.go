package chat

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// The methods below read expressions, from what binds least to what binds most.

// tuple reads expressions with commas between; a single one is itself.
func (p *parser) tuple() (expression, error) {
	first, err := p.expression()
	if err != nil || p.peek().text != "," || p.peek().kind != tokOperator {
		return first, err
	}
	items := []expression{first}
	for p.op(",") {
		if k := p.peek(); k.kind == tokEnd || k.text == ")" {
			break
		}
		e, err := p.expression()
		if err != nil {
			return nil, err
		}
		items = append(items, e)
	}
	return listOf(items, true), nil
}

func listOf(items []expression, tuple bool) expression {
	return func(f *frame) (value, error) {
		l := &list{items: make([]value, len(items)), tuple: tuple}
		for i, e := range items {
			v, err := e(f)
			if err != nil {
				return nil, err
			}
			l.items[i] = v
		}
		return l, f.budget.take(16 * len(items))
	}
}

// expression reads "a if condition else b".
func (p *parser) expression() (expression, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	then, err := p.or()
	if err != nil {
		return nil, err
	}
	for p.word("if") {
		when, err := p.or()
		if err != nil {
			return nil, err
		}
		other := expression(func(*frame) (value, error) { return undefined{"else"}, nil })
		if p.word("else") {
			if other, err = p.expression(); err != nil {
				return nil, err
			}
		}
		chosen := then
		then = func(f *frame) (value, error) {
			v, err := when(f)
			if err != nil {
				return nil, err
			}
			if truth(v) {
				return chosen(f)
			}
			return other(f)
		}
	}
	return then, nil
}

func (p *parser) or() (expression, error)  { return p.either("or", p.and) }
func (p *parser) and() (expression, error) { return p.either("and", p.not) }

// either reads operands of "or" or "and", which decide by the first that is enough.
func (p *parser) either(word string, operand func() (expression, error)) (expression, error) {
	left, err := operand()
	for err == nil && p.word(word) {
		var right expression
		if right, err = operand(); err != nil {
			break
		}
		first := left
		left = func(f *frame) (value, error) {
			v, err := first(f)
			if err != nil || truth(v) == (word == "or") {
				return v, err
			}
			return right(f)
		}
	}
	return left, err
}

func (p *parser) not() (expression, error) {
	if !p.word("not") {
		return p.comparison()
	}
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	e, err := p.not()
	return func(f *frame) (value, error) {
		v, err := e(f)
		return !truth(v), err
	}, err
}

func (p *parser) comparison() (expression, error) {
	left, err := p.sum()
	if err != nil {
		return nil, err
	}
	type link struct {
		op    string
		right expression
	}
	var links []link
	for {
		op := ""
		for _, o := range []string{"==", "!=", "<=", ">=", "<", ">"} {
			if p.op(o) {
				op = o
				break
			}
		}
		switch {
		case op != "":
		case p.word("in"):
			op = "in"
		case p.peek().text == "not" && p.tokens[1].text == "in" && p.tokens[1].kind == tokName:
			p.take()
			p.take()
			op = "not in"
		default:
			if len(links) == 0 {
				return left, nil
			}
			return func(f *frame) (value, error) {
				a, err := left(f)
				for _, l := range links {
					if err != nil {
						return nil, err
					}
					var b value
					if b, err = l.right(f); err != nil {
						return nil, err
					}
					var ok bool
					if ok, err = compare(l.op, a, b); err != nil || !ok {
						return false, err
					}
					a = b
				}
				return true, err
			}, nil
		}
		right, err := p.sum()
		if err != nil {
			return nil, err
		}
		links = append(links, link{op, right})
	}
}

func compare(op string, a, b value) (bool, error) {
	switch op {
	case "==":
		return equal(a, b), nil
	case "!=":
		return !equal(a, b), nil
	case "in":
		return contains(b, a)
	case "not in":
		ok, err := contains(b, a)
		return !ok, err
	}
	n, err := order(a, b)
	switch op {
	case "<":
		return n < 0, err
	case "<=":
		return n <= 0, err
	case ">":
		return n > 0, err
	}
	return n >= 0, err
}

// contains is Python's in.
func contains(all, v value) (bool, error) {
	switch all := all.(type) {
	case string:
		s, ok := v.(string)
		if !ok {
			return false, fmt.Errorf("%s cannot be in a str", kind(v))
		}
		return strings.Contains(all, s), nil
	case *list:
		for _, x := range all.items {
			if equal(x, v) {
				return true, nil
			}
		}
		return false, nil
	case *dict:
		s, ok := v.(string)
		_, has := all.values[s]
		return ok && has, nil
	case undefined:
		return false, nil
	}
	return false, fmt.Errorf("nothing can be in %s", kind(all))
}

func (p *parser) sum() (expression, error)     { return p.binary(p.concat, "+", "-") }
func (p *parser) concat() (expression, error)  { return p.binary(p.product, "~") }
func (p *parser) product() (expression, error) { return p.binary(p.power, "*", "//", "/", "%") }
func (p *parser) power() (expression, error)   { return p.binary(p.unary, "**") }

func (p *parser) binary(operand func() (expression, error), ops ...string) (expression, error) {
	left, err := operand()
	for err == nil {
		op := ""
		for _, o := range ops {
			if p.op(o) {
				op = o
				break
			}
		}
		if op == "" {
			return left, nil
		}
		var right expression
		if right, err = operand(); err != nil {
			break
		}
		first := left
		left = func(f *frame) (value, error) {
			a, err := first(f)
			if err != nil {
				return nil, err
			}
			b, err := right(f)
			if err != nil {
				return nil, err
			}
			if err := f.budget.step(); err != nil {
				return nil, err
			}
			return combine(f, op, a, b)
		}
	}
	return nil, err
}

func combine(f *frame, op string, a, b value) (value, error) {
	if op == "~" {
		s := toString(a) + toString(b)
		return s, f.budget.take(len(s))
	}
	if s, ok := a.(string); ok && op == "+" {
		if t, ok := b.(string); ok {
			return s + t, f.budget.take(len(s) + len(t))
		}
	}
	if x, ok := a.(*list); ok && op == "+" {
		if y, ok := b.(*list); ok {
			l := &list{items: append(append([]value{}, x.items...), y.items...)}
			return l, f.budget.take(16 * len(l.items))
		}
	}
	if s, ok := a.(string); ok && op == "*" {
		if n, ok := b.(int64); ok {
			n = min(max(n, 0), maxMemory)
			if err := f.budget.take(len(s) * int(n)); err != nil {
				return nil, err
			}
			return strings.Repeat(s, int(n)), nil
		}
	}
	i, okI := integer(a)
	j, okJ := integer(b)
	if okI && okJ && op != "/" && op != "**" {
		return integers(op, i, j)
	}
	x, okX := number(a)
	y, okY := number(b)
	if !okX || !okY {
		return nil, fmt.Errorf("%s %s %s has no meaning", kind(a), op, kind(b))
	}
	switch op {
	case "+":
		return x + y, nil
	case "-":
		return x - y, nil
	case "*":
		return x * y, nil
	case "**":
		r := math.Pow(x, y)
		if okI && okJ && j >= 0 && math.Abs(r) < 1<<53 {
			return int64(r), nil
		}
		return r, nil
	}
	if y == 0 {
		return nil, errors.New("division by zero")
	}
	switch op {
	case "/":
		return x / y, nil
	case "//":
		return math.Floor(x / y), nil
	}
	return x - y*math.Floor(x/y), nil
}

// integer returns whole numbers, and truth values as 0 and 1.
func integer(v value) (int64, bool) {
	switch v := v.(type) {
	case int64:
		return v, true
	case bool:
		n, _ := number(v)
		return int64(n), true
	}
	return 0, false
}

// integers computes with whole numbers as Python does: division rounds down.
func integers(op string, i, j int64) (value, error) {
	switch op {
	case "+":
		return i + j, nil
	case "-":
		return i - j, nil
	case "*":
		return i * j, nil
	}
	if j == 0 {
		return nil, errors.New("division by zero")
	}
	q, r := i/j, i%j
	if r != 0 && (r < 0) != (j < 0) {
		q, r = q-1, r+j
	}
	if op == "//" {
		return q, nil
	}
	return r, nil
}

func (p *parser) unary() (expression, error) {
	e, err := p.signed()
	if err != nil {
		return nil, err
	}
	return p.filtered(e)
}

// signed reads a value with what belongs to it before its sign, but no filters:
// -3 | abs is 3.
func (p *parser) signed() (expression, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	switch {
	case p.op("-"):
		inner, err := p.signed()
		return func(f *frame) (value, error) {
			v, err := inner(f)
			if err != nil {
				return nil, err
			}
			return combine(f, "-", int64(0), v)
		}, err
	case p.op("+"):
		return p.signed()
	}
	e, err := p.primary()
	if err != nil {
		return nil, err
	}
	return p.postfix(e)
}

// constants are names with a fixed meaning.
var constants = map[string]value{"true": true, "True": true, "false": false, "False": false, "none": nil, "None": nil}

func (p *parser) primary() (expression, error) {
	t := p.take()
	switch t.kind {
	case tokName:
		if v, ok := constants[t.text]; ok {
			return func(*frame) (value, error) { return v, nil }, nil
		}
		return func(f *frame) (value, error) { return f.lookup(t.text), f.budget.step() }, nil
	case tokString:
		text := t.text
		for p.peek().kind == tokString {
			text += p.take().text
		}
		return func(*frame) (value, error) { return text, nil }, nil
	case tokInt:
		n, err := strconv.ParseInt(t.text, 10, 64)
		return func(*frame) (value, error) { return n, nil }, err
	case tokFloat:
		n, err := strconv.ParseFloat(t.text, 64)
		return func(*frame) (value, error) { return n, nil }, err
	case tokOperator:
		switch t.text {
		case "(":
			if p.op(")") {
				return listOf(nil, true), nil
			}
			e, err := p.tuple()
			if err != nil {
				return nil, err
			}
			return e, p.expectOp(")")
		case "[":
			items, err := p.items("]")
			return listOf(items, false), err
		case "{":
			return p.dict()
		}
	}
	return nil, fmt.Errorf("%q instead of a value", t.text)
}

// items reads expressions with commas between, up to a bracket.
func (p *parser) items(end string) ([]expression, error) {
	var items []expression
	for !p.op(end) {
		e, err := p.expression()
		if err != nil {
			return nil, err
		}
		items = append(items, e)
		if !p.op(",") && p.peek().text != end {
			return nil, fmt.Errorf("%q instead of %q", p.peek().text, end)
		}
	}
	return items, nil
}

func (p *parser) dict() (expression, error) {
	var keys, values []expression
	for !p.op("}") {
		k, err := p.expression()
		if err != nil {
			return nil, err
		}
		if err := p.expectOp(":"); err != nil {
			return nil, err
		}
		v, err := p.expression()
		if err != nil {
			return nil, err
		}
		keys, values = append(keys, k), append(values, v)
		if !p.op(",") && p.peek().text != "}" {
			return nil, fmt.Errorf("%q in a dict", p.peek().text)
		}
	}
	return func(f *frame) (value, error) {
		d := &dict{}
		for i := range keys {
			k, err := keys[i](f)
			if err != nil {
				return nil, err
			}
			name, ok := k.(string)
			if !ok {
				return nil, fmt.Errorf("%s as a key of a dict", kind(k))
			}
			v, err := values[i](f)
			if err != nil {
				return nil, err
			}
			d.set(name, v)
		}
		return d, f.budget.take(32 * len(keys))
	}, nil
}
