// Package grammar tells which bytes may come next in a text that must have a
// given form, so that a language model can be held to it.
//
// A form is a context-free grammar over bytes. Matching keeps every stack that
// the text so far may have led to; sets of stacks are numbered when they are
// first met, so that what is walked twice costs one look-up a byte.
package grammar

import (
	"encoding/binary"
	"slices"

	"github.com/atoll-run/atoll/sandbox"
)

// Bounds on what one grammar may grow into: a form comes from a client.
const (
	maxRules  = 1 << 16
	maxStacks = 1 << 18 // numbered stack cells of one grammar
	maxStates = 1 << 16 // numbered sets of stacks of one grammar
	maxWidth  = 1 << 10 // stacks in one set
)

// class is a set of bytes.
type class [4]uint64

func (c *class) add(b byte)      { c[b>>6] |= 1 << (b & 63) }
func (c *class) has(b byte) bool { return c[b>>6]&(1<<(b&63)) != 0 }

func span(lo, hi byte) class {
	var c class
	for b := int(lo); b <= int(hi); b++ {
		c.add(byte(b))
	}
	return c
}

// element is one position of an alternative: a byte of a class, or a whole rule.
type element struct {
	rule int // -1 for a byte
	set  class
}

// rule is a list of alternatives, each a sequence of elements. An empty
// alternative matches nothing.
type rule [][]element

// cell is one entry of a stack: the rest of an alternative that is still to come.
type cell struct {
	rule, alt, at int
	below         int32 // number of the cell below; 0 is the bottom
}

// State is the number of a set of stacks of a Grammar. Dead accepts nothing.
type State int32

// Dead is the state of a text that cannot be continued to one of the form.
const Dead State = -1

// Grammar is a form and what has been learnt about it by matching. It is used by
// one goroutine at a time.
type Grammar struct {
	rules []rule
	start State

	cells   []cell // cells[0] is the bottom
	cellID  map[cell]int32
	sets    [][]int32 // of each state, the top cells, ascending; 0 is the finished stack
	setID   map[string]State
	moves   []*[256]State // of each state; unknown is 0 where not yet computed
	tooMuch bool
}

const unknown State = -2

// finish makes a grammar of rules, of which the first is the start.
func finish(rules []rule) (*Grammar, error) {
	const op = "grammar.finish"
	if len(rules) > maxRules {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "the form needs %d rules, more than %d", len(rules), maxRules)
	}
	g := &Grammar{rules: rules, cells: make([]cell, 1), cellID: map[cell]int32{}, setID: map[string]State{}}
	var set []int32
	for alt := range rules[0] {
		set = g.expand(set, cell{rule: 0, alt: alt}, 0)
	}
	g.start = g.number(set)
	if g.tooMuch || g.start == Dead {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "the form is too complex, or nothing is of it")
	}
	return g, nil
}

// Start is the state before the first byte.
func (g *Grammar) Start() State { return g.start }

// Done reports whether the text so far is of the form.
func (g *Grammar) Done(s State) bool { return s != Dead && g.sets[s][0] == 0 }

// Next is the state after one more byte. A grammar that has outgrown its bounds
// is dead from then on.
func (g *Grammar) Next(s State, b byte) State {
	if s == Dead {
		return Dead
	}
	if g.moves[s] == nil {
		t := new([256]State)
		for i := range t {
			t[i] = unknown
		}
		g.moves[s] = t
	}
	to := g.moves[s][b]
	if to == unknown {
		to = g.move(s, b)
		g.moves[s][b] = to
	}
	return to
}

// Walk is the state after text.
func (g *Grammar) Walk(s State, text []byte) State {
	for _, b := range text {
		if s = g.Next(s, b); s == Dead {
			break
		}
	}
	return s
}

func (g *Grammar) move(s State, b byte) State {
	var set []int32
	for _, id := range g.sets[s] {
		if id == 0 {
			continue
		}
		c := g.cells[id]
		e := g.rules[c.rule][c.alt][c.at]
		if !e.set.has(b) {
			continue
		}
		c.at++
		set = g.expand(set, c, 0)
	}
	return g.number(set)
}

// maxExpand bounds the chain of rules that begin with rules. The compiler makes
// no rule that begins with itself.
const maxExpand = 256

// expand adds to set the stacks whose top is a byte, or that are finished, which
// the stack of c leads to without reading anything.
func (g *Grammar) expand(set []int32, c cell, depth int) []int32 {
	if g.tooMuch || depth > maxExpand || len(set) > maxWidth {
		g.tooMuch = true
		return set
	}
	alt := g.rules[c.rule][c.alt]
	if c.at == len(alt) {
		if c.below == 0 {
			return append(set, 0)
		}
		return g.expand(set, g.cells[c.below], depth+1)
	}
	e := alt[c.at]
	if e.rule < 0 {
		return append(set, g.cell(c))
	}
	below := c.below
	if c.at+1 < len(alt) { // else the rule takes the place of its caller, so that repetition needs no depth
		rest := c
		rest.at++
		below = g.cell(rest)
	}
	for i := range g.rules[e.rule] {
		set = g.expand(set, cell{rule: e.rule, alt: i, below: below}, depth+1)
	}
	return set
}

func (g *Grammar) cell(c cell) int32 {
	id, ok := g.cellID[c]
	if !ok {
		if len(g.cells) >= maxStacks {
			g.tooMuch = true
			return 0
		}
		id = int32(len(g.cells)) // bounded by maxStacks
		g.cells = append(g.cells, c)
		g.cellID[c] = id
	}
	return id
}

func (g *Grammar) number(set []int32) State {
	if len(set) == 0 || g.tooMuch {
		return Dead
	}
	slices.Sort(set)
	set = slices.Compact(set)
	key := make([]byte, 0, 4*len(set))
	for _, id := range set {
		key = binary.LittleEndian.AppendUint32(key, uint32(id))
	}
	s, ok := g.setID[string(key)]
	if !ok {
		if len(g.sets) >= maxStates {
			g.tooMuch = true
			return Dead
		}
		s = State(len(g.sets))
		g.sets = append(g.sets, set)
		g.moves = append(g.moves, nil)
		g.setID[string(key)] = s
	}
	return s
}
