package chat

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// An expression gives a value; a statement does something. Both are made once by
// the parser, and hold nothing that changes.
type (
	expression func(*frame) (value, error)
	statement  func(*frame) error
)

// A frame is where statements run: what names mean here, and what has been printed.
type frame struct {
	scope   *scope
	out     *strings.Builder
	budget  *budget
	filters map[string]filterFunc
}

type scope struct {
	vars   map[string]value
	parent *scope
}

// A budget is what one rendering may still use up; it only grows.
type budget struct {
	steps, memory, depth int
	until                time.Time
}

var errBudget = errors.New("it takes too long, or too much memory")

// step counts an expression.
func (b *budget) step() error {
	b.steps++
	if b.steps > maxSteps || b.steps%256 == 0 && time.Now().After(b.until) {
		return errBudget
	}
	return nil
}

// take counts bytes that are made.
func (b *budget) take(n int) error {
	if b.memory += n; n < 0 || b.memory > maxMemory {
		return errBudget
	}
	return nil
}

// enter counts calls that are inside of each other; leave must follow.
func (b *budget) enter() error {
	if b.depth++; b.depth > maxDepth {
		return errors.New("macros call each other without end")
	}
	return nil
}

func (b *budget) leave() { b.depth-- }

// inner returns a frame whose names are its own, on top of those of f.
func (f *frame) inner() *frame {
	return &frame{scope: &scope{vars: map[string]value{}, parent: f.scope}, out: f.out, budget: f.budget, filters: f.filters}
}

func (f *frame) lookup(name string) value {
	for s := f.scope; s != nil; s = s.parent {
		if v, ok := s.vars[name]; ok {
			return v
		}
	}
	return undefined{name}
}

func (f *frame) run(body []statement) error {
	for _, s := range body {
		if err := s(f); err != nil {
			return err
		}
	}
	return nil
}

// capture runs statements and returns what they print.
func (f *frame) capture(body []statement) (string, error) {
	inside := *f
	inside.out = &strings.Builder{}
	err := inside.run(body)
	return inside.out.String(), err
}

func (f *frame) print(text string) error {
	f.out.WriteString(text)
	return f.budget.take(len(text))
}

// loopControl leaves a loop, or what is left of a round.
type loopControl string

func (l loopControl) Error() string { return string(l) + " outside of a loop" }

// elements returns what a loop goes over.
func elements(v value) ([]value, error) {
	switch v := v.(type) {
	case *list:
		return v.items, nil
	case *dict:
		return keysOf(v), nil
	case string:
		var out []value
		for _, r := range v {
			out = append(out, string(r))
		}
		return out, nil
	case undefined:
		return nil, nil
	}
	return nil, fmt.Errorf("%s cannot be gone over", kind(v))
}

func keysOf(d *dict) []value {
	out := make([]value, len(d.keys))
	for i, k := range d.keys {
		out[i] = k
	}
	return out
}

func pairsOf(d *dict) *list {
	out := &list{}
	for _, k := range d.keys {
		out.items = append(out.items, &list{items: []value{k, d.values[k]}, tuple: true})
	}
	return out
}

// A loop is a for statement.
type loop struct {
	names []string // more than one take an element apart
	over  expression
	where expression // nil: all
	body  []statement
	empty []statement // runs when there is nothing to go over
}

func (l *loop) run(f *frame) error {
	v, err := l.over(f)
	if err != nil {
		return err
	}
	items, err := elements(v)
	if err != nil {
		return err
	}
	if l.where != nil {
		if items, err = l.filter(f, items); err != nil {
			return err
		}
	}
	if len(items) == 0 {
		return f.inner().run(l.empty)
	}
	for i, item := range items {
		if err := f.budget.step(); err != nil {
			return err
		}
		round := f.inner()
		round.scope.vars["loop"] = loopInfo(items, i)
		if err := l.bind(round, item); err != nil {
			return err
		}
		err := round.run(l.body)
		var control loopControl
		if errors.As(err, &control) {
			if control == "break" {
				return nil
			}
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *loop) filter(f *frame, items []value) ([]value, error) {
	var kept []value
	for _, item := range items {
		round := f.inner()
		if err := l.bind(round, item); err != nil {
			return nil, err
		}
		v, err := l.where(round)
		if err != nil {
			return nil, err
		}
		if truth(v) {
			kept = append(kept, item)
		}
	}
	return kept, nil
}

func (l *loop) bind(f *frame, item value) error {
	if len(l.names) == 1 {
		f.scope.vars[l.names[0]] = item
		return nil
	}
	parts, err := elements(item)
	if err != nil || len(parts) != len(l.names) {
		return fmt.Errorf("%s cannot be taken apart into %d", kind(item), len(l.names))
	}
	for i, name := range l.names {
		f.scope.vars[name] = parts[i]
	}
	return nil
}

// loopInfo is the variable loop in a round.
func loopInfo(items []value, i int) *dict {
	d := &dict{}
	n := len(items)
	d.set("index", int64(i+1))
	d.set("index0", int64(i))
	d.set("revindex", int64(n-i))
	d.set("revindex0", int64(n-i-1))
	d.set("first", i == 0)
	d.set("last", i == n-1)
	d.set("length", int64(n))
	if i > 0 {
		d.set("previtem", items[i-1])
	}
	if i < n-1 {
		d.set("nextitem", items[i+1])
	}
	d.set("cycle", function(func(_ *frame, a *arguments) (value, error) {
		if len(a.list) == 0 {
			return nil, errors.New("loop.cycle wants values")
		}
		return a.list[i%len(a.list)], nil
	}))
	return d
}

// A macro is a function that a template defines.
type macro struct {
	names    []string
	defaults []expression // as long as names; nil: none
	body     []statement
}

func (m *macro) call(home *scope) function {
	return func(f *frame, a *arguments) (value, error) {
		if err := f.budget.enter(); err != nil {
			return nil, err
		}
		defer f.budget.leave()
		inside := &frame{scope: &scope{vars: map[string]value{}, parent: home}, budget: f.budget, filters: f.filters}
		if len(a.list) > len(m.names) {
			return nil, fmt.Errorf("a macro with %d parameters was called with %d", len(m.names), len(a.list))
		}
		for i, name := range m.names {
			v := a.at(i, name)
			if _, missing := v.(undefined); missing && m.defaults[i] != nil {
				var err error
				if v, err = m.defaults[i](inside); err != nil {
					return nil, err
				}
			}
			inside.scope.vars[name] = v
		}
		return inside.capture(m.body)
	}
}

func newNamespace(_ *frame, a *arguments) (value, error) {
	n := &namespace{}
	for k, v := range a.named {
		n.set(k, v)
	}
	return n, nil
}

func newDict(_ *frame, a *arguments) (value, error) {
	if len(a.named) > 1 {
		return nil, fmt.Errorf("%w: dict with several arguments, whose order is not kept", errors.ErrUnsupported)
	}
	d := &dict{}
	for k, v := range a.named {
		d.set(k, v)
	}
	return d, nil
}

func newRange(f *frame, a *arguments) (value, error) {
	bounds := [3]int64{0, 0, 1}
	switch len(a.list) {
	case 1, 2, 3:
		for i, v := range a.list {
			n, ok := v.(int64)
			if !ok {
				return nil, fmt.Errorf("range of %s", kind(v))
			}
			bounds[i] = n
		}
		if len(a.list) == 1 {
			bounds[0], bounds[1] = 0, bounds[0]
		}
	default:
		return nil, errors.New("range wants one to three numbers")
	}
	from, to, step := bounds[0], bounds[1], bounds[2]
	if step == 0 {
		return nil, errors.New("a range without steps")
	}
	out := &list{}
	for i := from; step > 0 && i < to || step < 0 && i > to; i += step {
		if err := f.budget.take(16); err != nil {
			return nil, err
		}
		out.items = append(out.items, i)
	}
	return out, nil
}
