package transfer

// A cutGroup is a group that is complete, with its literals.
type cutGroup struct {
	group
	data *[]byte // nil without literals; of the encoder's pool
}

// literalBytes returns the literals.
func (c *cutGroup) literalBytes() []byte {
	if c.data == nil {
		return nil
	}
	return *c.data
}

// A grouper cuts the new image into groups. What it knows of earlier pages of the image it keeps in an index, which
// only proposes as well. It is used by one goroutine.
type grouper struct {
	e     *encoder
	emit  func(*cutGroup) error
	seen  *Index // of literals; its anchors are those of groups that are cut
	peek  peeker
	group *cutGroup
	// Pages that literals of the group have something in common with, and how much.
	voteBase, voteNew map[int64]int
	patches           int           // bytes of the group's
	fresh             []freshAnchor // of the group's literals
}

type freshAnchor struct {
	key uint64
	end int64
}

func newGrouper(e *encoder, emit func(*cutGroup) error) *grouper {
	g := &grouper{e: e, emit: emit, peek: peeker{image: e.next}, voteBase: map[int64]int{}, voteNew: map[int64]int{}}
	if !e.baseOnly {
		g.seen = newIndex(e.next.Size)
	}
	g.start(0)
	return g
}

func (g *grouper) start(first int64) {
	g.group = &cutGroup{group: group{first: first}}
	clear(g.voteBase)
	clear(g.voteNew)
	g.patches = 0
}

// add takes the next segment.
func (g *grouper) add(s *scanned) error {
	for i := range s.places {
		p := &s.places[i]
		unit := s.data[i*g.e.unit : (i+1)*g.e.unit]
		at := (g.group.first + g.group.units) * int64(g.e.unit)
		if p.kind == literal {
			if err := g.earlier(p, unit, at); err != nil {
				return err
			}
		}
		g.count(p.kind)
		g.group.add(p.kind, p.from, g.e.unit)
		if p.kind == literal {
			if g.group.data == nil {
				g.group.data = g.e.buffer(g.e.frame)
			}
			*g.group.data = append(*g.group.data, unit...)
			g.vote(p, at)
		}
		if p.kind == patched {
			g.group.patches = append(g.group.patches, p.patch)
			g.patches += len(p.patch.changes) + len(p.patch.data)
		}
		if g.full() {
			if err := g.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// full reports whether the group must be cut. A large dictionary cuts it early: the compressor's tables hold some
// megabytes of it and of the literals together, and what falls out is not found.
func (g *grouper) full() bool {
	dictionary, literals := (len(g.voteBase)+len(g.voteNew))*pageSize, int(g.group.literals)*g.e.unit
	return literals == g.e.frame || g.group.units == maxGroupUnits || g.patches >= maxGroupPatches ||
		literals+dictionaryWeight*dictionary >= g.e.frame+g.e.frame/2
}

// dictionaryWeight is how much sooner a byte of the dictionary fills a group than one of the literals. Measured: with
// it, an upgraded disk takes 11 % less, and one with new content as much as without.
const dictionaryWeight = 2

// earlier looks for a unit among the literals before it.
func (g *grouper) earlier(p *place, unit []byte, at int64) error {
	if g.seen == nil {
		return nil
	}
	for _, from := range g.seen.page(p.hash) {
		if from == noOffset {
			break
		}
		b, err := g.peek.at(from, len(unit))
		if err != nil {
			return err
		}
		if string(b) == string(unit) {
			p.kind, p.from = earlier, from
			return nil
		}
	}
	g.seen.addPage(p.hash, uint32(at/pageSize))
	return nil
}

// vote notes what a literal has in common with other pages.
func (g *grouper) vote(p *place, at int64) {
	for _, page := range p.votes {
		g.voteBase[page/pageSize]++
	}
	if p.beside {
		g.voteBase[at/pageSize] += sameVotes
	}
	if g.seen == nil {
		return
	}
	for _, a := range p.anchors {
		if !g.seen.keeps(a.key) {
			continue
		}
		g.fresh = append(g.fresh, freshAnchor{a.key, at + int64(a.end)})
		if a.inBase {
			continue
		}
		if end := g.seen.anchor(a.key); end != noOffset {
			g.voteNew[(end-1)/pageSize]++
		}
	}
}

func (g *grouper) count(k kind) {
	s := &g.e.stats
	*[kinds]*int64{same: &s.Same, zero: &s.Zero, moved: &s.Moved, shifted: &s.Moved, earlier: &s.Earlier, literal: &s.Literal, patched: &s.Patched}[k] += int64(g.e.unit)
}

// flush cuts the group, if it has anything.
func (g *grouper) flush() error {
	c := g.group
	if c.units == 0 {
		return nil
	}
	c.fromBase = choose(g.voteBase, maxDictionary/pageSize)
	c.fromNew = choose(g.voteNew, maxDictionary/pageSize-int(pageCount(c.fromBase)))
	for _, a := range g.fresh {
		g.seen.addAnchor(a.key, a.end)
	}
	g.fresh = g.fresh[:0]
	g.start(c.first + c.units)
	return g.emit(c)
}
