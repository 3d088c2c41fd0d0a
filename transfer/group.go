package transfer

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// A group is a run of units of the new image whose literals make up one frame. It can be decoded by itself, given the
// base and what comes before it in the new image.
type group struct {
	first    int64 // the number of its first unit
	units    int64
	runs     []run
	literals int64   // units
	patches  []patch // of the patched units, in order
	// The dictionary, in this order: pages of the new image before the group, then pages of the base.
	fromNew, fromBase []span
}

// A run is units that follow each other, in the new image and where they come from.
type run struct {
	kind  kind
	units int64
	from  int64 // offset of the first unit, for moved, shifted and earlier
}

// A span is a run of pages of 4 KB, by number.
type span struct{ first, pages int64 }

func pageCount(spans []span) (n int64) {
	for _, s := range spans {
		n += s.pages
	}
	return n
}

// add appends one unit to the group.
func (g *group) add(k kind, from int64, unit int) {
	g.units++
	if k == literal {
		g.literals++
	}
	if n := len(g.runs); n > 0 {
		if last := &g.runs[n-1]; last.kind == k && (!k.refers() || from == last.from+last.units*int64(unit)) {
			last.units++
			return
		}
	}
	if !k.refers() {
		from = 0
	}
	g.runs = append(g.runs, run{k, 1, from})
}

// refers reports whether a run of the kind has an offset.
func (k kind) refers() bool { return k == moved || k == shifted || k == earlier || k == patched }

// appendMap encodes runs and dictionary. All of what has the same meaning lies together, for the sake of compression.
// Offsets are relative to where the unit itself lies, and that to the run before: what moved together is 0.
func (g *group) appendMap(b []byte, unit int) []byte {
	b = binary.AppendUvarint(b, uint64(len(g.runs)))
	for _, r := range g.runs {
		b = binary.AppendUvarint(b, uint64(r.units-1)*uint64(kinds)+uint64(r.kind))
	}
	at := g.first * int64(unit)
	var before [kinds]int64
	for _, r := range g.runs {
		if r.kind.refers() {
			move := r.from - at
			b = binary.AppendVarint(b, (move-before[r.kind])/r.kind.step(unit))
			before[r.kind] = move
		}
		at += r.units * int64(unit)
	}
	for _, spans := range [][]span{g.fromNew, g.fromBase} {
		b = binary.AppendUvarint(b, uint64(len(spans)))
		end := int64(0)
		for _, s := range spans {
			b = binary.AppendUvarint(b, uint64(s.first-end))
			b = binary.AppendUvarint(b, uint64(s.pages-1))
			end = s.first + s.pages
		}
	}
	for _, p := range g.patches {
		b = append(b, p.changes...)
	}
	for _, p := range g.patches {
		b = append(b, p.data...)
	}
	return b
}

// step is what offsets of a run of the kind are multiples of.
func (k kind) step(unit int) int64 {
	if k == shifted || k == patched {
		return 1
	}
	return int64(unit)
}

// A layout is what a group is checked against: the sizes that the delta's header gives.
type layout struct {
	unit     int
	frame    int   // literals of a frame, at most
	next     int64 // bytes of the new image
	base     int64 // bytes of the base; 0 without one
	baseOnly bool
}

// units of the new image.
func (l layout) units() int64 { return (l.next + int64(l.unit) - 1) / int64(l.unit) }

// parseMap decodes what appendMap made. g has its first unit, units and literals already; whatever is decoded is
// checked against them and the layout, so that using it needs no further checks of bounds.
func (g *group) parseMap(b []byte, l layout) error {
	c := cursor{b: b}
	n := c.count(maxGroupUnits)
	g.runs = slices.Grow(g.runs[:0], min(n, len(b)))
	var units, literals, changed int64
	for range n {
		v := c.uvarint()
		r := run{kind: kind(v % uint64(kinds)), units: int64(min(v/uint64(kinds), maxGroupUnits)) + 1}
		if units += r.units; units > g.units || c.err != nil {
			return c.fail("more units than the group has")
		}
		if r.kind == literal {
			literals += r.units
		}
		if r.kind == patched {
			changed += r.units
		}
		g.runs = append(g.runs, r)
	}
	if units != g.units || literals != g.literals {
		return c.fail("units or literals are missing")
	}
	at := g.first * int64(l.unit)
	var before [kinds]int64
	for i := range g.runs {
		r := &g.runs[i]
		if r.kind.refers() {
			before[r.kind] += c.varint(2*maxImage/r.kind.step(l.unit)) * r.kind.step(l.unit)
			r.from = at + before[r.kind]
		}
		if !r.within(at, l) {
			return c.fail("a run lies outside of where it comes from")
		}
		at += r.units * int64(l.unit)
	}
	pages := int64(0)
	end := g.first * int64(l.unit) / pageSize
	if l.baseOnly {
		end = 0
	}
	g.fromNew = c.spans(g.fromNew[:0], end, &pages)
	g.fromBase = c.spans(g.fromBase[:0], (l.base+pageSize-1)/pageSize, &pages)
	g.patches = c.patches(changed, l.unit)
	if c.err == nil && len(c.b) > 0 {
		return c.fail("something follows the map")
	}
	return c.err
}

// within reports whether a run at an offset of the new image comes from inside the base, or from the new image before it.
func (r run) within(at int64, l layout) bool {
	size := r.units * int64(l.unit)
	// The last unit of an image may be there in part only.
	part := int64(l.unit) - 1
	switch r.kind {
	case same:
		return at+size <= l.base+part
	case moved:
		return r.from >= 0 && r.from%int64(l.unit) == 0 && r.from+size <= l.base+part
	case shifted:
		return r.from >= 0 && r.from+size <= l.base
	case patched:
		return r.from >= 0 && r.from+size <= l.base && at+size <= l.next
	case earlier:
		return !l.baseOnly && r.from >= 0 && r.from+int64(l.unit) <= at
	}
	return true
}

// A cursor reads numbers and keeps the first failure.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) fail(what string) error {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s", ErrCorrupt, what)
	}
	return c.err
}

func (c *cursor) uvarint() uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		_ = c.fail("a number is missing")
		c.b = nil
		return 0
	}
	c.b = c.b[n:]
	return v
}

// varint returns a number of at most limit, of either sign.
func (c *cursor) varint(limit int64) int64 {
	v, n := binary.Varint(c.b)
	if n <= 0 || v > limit || v < -limit {
		_ = c.fail("a number is missing or too large")
		c.b = nil
		return 0
	}
	c.b = c.b[n:]
	return v
}

// count returns a number of at most limit.
func (c *cursor) count(limit int) int {
	v := c.uvarint()
	if v > uint64(limit) {
		_ = c.fail("a number is too large")
		return 0
	}
	return int(v)
}

// spans reads a list of ascending spans of pages below end; pages counts all of a group.
func (c *cursor) spans(list []span, end int64, pages *int64) []span {
	at := int64(0)
	for range c.count(maxDictionary / pageSize) {
		s := span{first: at + int64(c.count(int(end))), pages: int64(c.count(maxDictionary/pageSize)) + 1}
		at = s.first + s.pages
		*pages += s.pages
		if c.err != nil || at > end || *pages > maxDictionary/pageSize {
			_ = c.fail("the dictionary has pages that do not exist, or too many")
			return list[:0]
		}
		list = append(list, s)
	}
	return list
}

// choose returns those of the pages that got votes, ascending, as spans: at most limit pages, those with the most votes.
func choose(votes map[int64]int, limit int) []span {
	pages := make([]int64, 0, len(votes))
	for p := range votes {
		pages = append(pages, p)
	}
	if len(pages) > limit {
		slices.SortFunc(pages, func(a, b int64) int { return cmp.Or(votes[b]-votes[a], cmp.Compare(a, b)) })
		pages = pages[:limit]
	}
	slices.Sort(pages)
	var spans []span
	for _, p := range pages {
		if n := len(spans); n > 0 && spans[n-1].first+spans[n-1].pages == p {
			spans[n-1].pages++
			continue
		}
		spans = append(spans, span{p, 1})
	}
	return spans
}
