package chat

import (
	"errors"
	"fmt"
	"slices"
)

// parser reads tokens. depth is how many expressions and statements it is inside of.
type parser struct {
	tokens []token
	depth  int
}

func parseTemplate(source string) ([]statement, error) {
	tokens, err := lex(source)
	if err != nil {
		return nil, err
	}
	p := &parser{tokens: tokens}
	body, _, err := p.body()
	if err == nil && p.peek().kind != tokEOF {
		err = fmt.Errorf("%q ends what was not begun", p.tokens[1].text)
	}
	if err != nil {
		return nil, fmt.Errorf("line %d: %w", p.peek().line, err)
	}
	return body, nil
}

func (p *parser) peek() token { return p.tokens[0] }

// take returns the next token and moves on, except at the end.
func (p *parser) take() token {
	t := p.tokens[0]
	if t.kind != tokEOF {
		p.tokens = p.tokens[1:]
	}
	return t
}

// accept moves on if the next token is this one.
func (p *parser) accept(kind tokenKind, text string) bool {
	if t := p.peek(); t.kind != kind || t.text != text {
		return false
	}
	p.take()
	return true
}

func (p *parser) op(text string) bool   { return p.accept(tokOperator, text) }
func (p *parser) word(text string) bool { return p.accept(tokName, text) }

func (p *parser) expectOp(text string) error {
	if !p.op(text) {
		return fmt.Errorf("%q instead of %q", p.peek().text, text)
	}
	return nil
}

func (p *parser) name() (string, error) {
	if t := p.peek(); t.kind != tokName {
		return "", fmt.Errorf("%q instead of a name", t.text)
	}
	return p.take().text, nil
}

// end takes the end of a tag.
func (p *parser) end() error {
	if t := p.take(); t.kind != tokEnd {
		return fmt.Errorf("%q instead of the end of the tag", t.text)
	}
	return nil
}

// enter refuses what is nested too deep; leave must follow.
func (p *parser) enter() error {
	if p.depth++; p.depth > maxDepth {
		return errors.New("it is nested too deep")
	}
	return nil
}

func (p *parser) leave() { p.depth-- }

// body reads statements up to a tag that begins with one of the words, which it
// takes and returns; without words, to the end of the template.
func (p *parser) body(until ...string) ([]statement, string, error) {
	if err := p.enter(); err != nil {
		return nil, "", err
	}
	defer p.leave()
	var out []statement
	for {
		switch t := p.peek(); t.kind {
		case tokText:
			p.take()
			out = append(out, func(f *frame) error { return f.print(t.text) })
		case tokPrint:
			p.take()
			e, err := p.expression()
			if err != nil {
				return nil, "", err
			}
			if err := p.end(); err != nil {
				return nil, "", err
			}
			out = append(out, show(e))
		case tokTag:
			word := p.tokens[1].text
			if slices.Contains(until, word) {
				p.take()
				p.take()
				return out, word, nil
			}
			if len(until) == 0 && len(word) > 3 && word[:3] == "end" {
				return out, "", nil
			}
			p.take()
			s, err := p.statement()
			if err != nil {
				return nil, "", err
			}
			out = append(out, s)
		default:
			if len(until) > 0 {
				return nil, "", fmt.Errorf("%q is missing", until[len(until)-1])
			}
			return out, "", nil
		}
	}
}

func show(e expression) statement {
	return func(f *frame) error {
		v, err := e(f)
		if err != nil {
			return err
		}
		return f.print(toString(v))
	}
}

// block reads statements up to their end tag, with the end of the tag.
func (p *parser) block(end string) ([]statement, error) {
	body, _, err := p.body(end)
	if err == nil {
		err = p.end()
	}
	return body, err
}

// statement reads the rest of a tag that has begun, and what belongs to it.
func (p *parser) statement() (statement, error) {
	word, err := p.name()
	if err != nil {
		return nil, err
	}
	switch word {
	case "if":
		return p.ifStatement()
	case "for":
		return p.forStatement()
	case "set":
		return p.setStatement()
	case "macro":
		return p.macroStatement()
	case "break", "continue":
		return func(*frame) error { return loopControl(word) }, p.end()
	case "generation": // marks what a model is trained on; prints as it is
		if err := p.end(); err != nil {
			return nil, err
		}
		body, err := p.block("endgeneration")
		return func(f *frame) error { return f.run(body) }, err
	}
	return nil, fmt.Errorf("%w: the statement %q", errors.ErrUnsupported, word)
}

func (p *parser) ifStatement() (statement, error) {
	type branch struct {
		when expression // nil: always
		body []statement
	}
	var branches []branch
	for word := "if"; word != "endif"; {
		b := branch{}
		var err error
		if word != "else" {
			if b.when, err = p.expression(); err != nil {
				return nil, err
			}
		}
		if err = p.end(); err != nil {
			return nil, err
		}
		ends := []string{"elif", "else", "endif"}
		if word == "else" {
			ends = ends[2:]
		}
		if b.body, word, err = p.body(ends...); err != nil {
			return nil, err
		}
		branches = append(branches, b)
	}
	return func(f *frame) error {
		for _, b := range branches {
			if b.when != nil {
				v, err := b.when(f)
				if err != nil {
					return err
				}
				if !truth(v) {
					continue
				}
			}
			return f.run(b.body)
		}
		return nil
	}, p.end()
}

// names reads names with commas between.
func (p *parser) names() ([]string, error) {
	var names []string
	bracket := p.op("(")
	for {
		name, err := p.name()
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		if !p.op(",") {
			break
		}
	}
	if bracket {
		return names, p.expectOp(")")
	}
	return names, nil
}

func (p *parser) forStatement() (statement, error) {
	l := &loop{}
	var err error
	if l.names, err = p.names(); err != nil {
		return nil, err
	}
	if !p.word("in") {
		return nil, errors.New("a loop without \"in\"")
	}
	if l.over, err = p.or(); err != nil { // no condition: its if is the loop's
		return nil, err
	}
	if p.word("if") {
		if l.where, err = p.expression(); err != nil {
			return nil, err
		}
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	var word string
	if l.body, word, err = p.body("else", "endfor"); err != nil {
		return nil, err
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	if word == "else" {
		if l.empty, err = p.block("endfor"); err != nil {
			return nil, err
		}
	}
	return l.run, nil
}

func (p *parser) setStatement() (statement, error) {
	name, err := p.name()
	if err != nil {
		return nil, err
	}
	field := ""
	if p.op(".") {
		if field, err = p.name(); err != nil {
			return nil, err
		}
	}
	names := []string{name}
	for field == "" && p.op(",") {
		if name, err = p.name(); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	if !p.op("=") {
		if err := p.end(); err != nil {
			return nil, err
		}
		body, err := p.block("endset")
		return func(f *frame) error {
			text, err := f.capture(body)
			if err != nil {
				return err
			}
			return assign(f, names, field, text)
		}, err
	}
	e, err := p.tuple()
	if err != nil {
		return nil, err
	}
	return func(f *frame) error {
		v, err := e(f)
		if err != nil {
			return err
		}
		return assign(f, names, field, v)
	}, p.end()
}

func assign(f *frame, names []string, field string, v value) error {
	if field != "" {
		n, ok := f.lookup(names[0]).(*namespace)
		if !ok {
			return fmt.Errorf("%s is not a namespace, so that its %s cannot be set", names[0], field)
		}
		n.set(field, v)
		return nil
	}
	return (&loop{names: names}).bind(f, v)
}

func (p *parser) macroStatement() (statement, error) {
	name, err := p.name()
	if err != nil {
		return nil, err
	}
	if err := p.expectOp("("); err != nil {
		return nil, err
	}
	m := &macro{}
	for !p.op(")") {
		parameter, err := p.name()
		if err != nil {
			return nil, err
		}
		var fallback expression
		if p.op("=") {
			if fallback, err = p.expression(); err != nil {
				return nil, err
			}
		}
		m.names, m.defaults = append(m.names, parameter), append(m.defaults, fallback)
		if !p.op(",") && p.peek().text != ")" {
			return nil, fmt.Errorf("%q among a macro's parameters", p.peek().text)
		}
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	m.body, err = p.block("endmacro")
	return func(f *frame) error {
		f.scope.vars[name] = m.call(f.scope)
		return nil
	}, err
}
