// Package prefetch learns which pages of a memory are needed soon after it is
// restored, from restore to restore, and says which to fetch ahead and in what order.
//
// All of it is pure: a Model is fed with traces, which are pages in the order of
// their first touch, and makes plans. How traces come about and plans are carried
// out is the runtimes' matter.
package prefetch

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
)

const (
	// MaxPages bounds the pages that a model remembers and a trace may have.
	MaxPages = 1 << 16
	// maxMemory is how many restores a model remembers: each one from then on
	// counts as much as all of the last ones did.
	maxMemory = 8
	// whole is a weight or a rank of one.
	whole = 1<<16 - 1
	// forgotten is the weight below which a page is dropped: one that was not
	// needed for a dozen restores.
	forgotten = whole / 64
	// rare is the weight below which a page is never fetched ahead.
	rare = whole / 5
)

// Model is what is known of the restores of one snapshot. The zero Model knows
// nothing. It is not safe for concurrent use.
type Model struct {
	runs  int    // restores that it learned from, at most maxMemory
	pages []page // in ascending order of their numbers
}

// page is one page that was needed.
type page struct {
	number uint32
	weight uint16 // in how many of the restores it was needed; whole: in all
	rank   uint16 // when it was needed, on average; 0: first
}

// Learn adds the trace of a restore: pages in the order of their first touch,
// none of them twice. Of longer traces than MaxPages the rest is ignored.
func (m *Model) Learn(trace []uint32) {
	trace = trace[:min(len(trace), MaxPages)]
	m.runs = min(m.runs+1, maxMemory)
	seen := make([]page, len(trace))
	for i, number := range trace {
		seen[i] = page{number, whole, uint16(i * whole / max(1, len(trace)))}
	}
	slices.SortFunc(seen, byNumber)
	seen = slices.CompactFunc(seen, func(a, b page) bool { return a.number == b.number })
	var merged []page
	for old := m.pages; len(old)+len(seen) > 0; {
		order := -1 // which comes first
		if len(old) == 0 {
			order = 1
		} else if len(seen) > 0 {
			order = cmp.Compare(old[0].number, seen[0].number)
		}
		var p page
		switch {
		case order < 0:
			p, old = page{old[0].number, m.toward(old[0].weight, 0), old[0].rank}, old[1:]
		case order > 0:
			p, seen = page{seen[0].number, m.toward(0, whole), seen[0].rank}, seen[1:]
		default:
			p = page{old[0].number, m.toward(old[0].weight, whole), m.toward(old[0].rank, seen[0].rank)}
			old, seen = old[1:], seen[1:]
		}
		if p.weight >= forgotten {
			merged = append(merged, p)
		}
	}
	if len(merged) > MaxPages {
		slices.SortFunc(merged, byWeight)
		merged = merged[:MaxPages]
		slices.SortFunc(merged, byNumber)
	}
	m.pages = merged
}

// toward moves an average over m.runs values by the last of them.
func (m *Model) toward(average, value uint16) uint16 {
	return uint16(int(average) + (int(value)-int(average))/m.runs)
}

func byNumber(a, b page) int { return cmp.Compare(a.number, b.number) }

// byWeight sorts the surest pages first.
func byWeight(a, b page) int {
	return cmp.Or(cmp.Compare(b.weight, a.weight), cmp.Compare(a.rank, b.rank), cmp.Compare(a.number, b.number))
}

// Plan returns the pages to fetch ahead, in the order in which they will be
// needed. It is the largest set of which, going by the restores so far, at least
// half will be needed: what is fetched in vain is bounded by what is not.
func (m *Model) Plan() []uint32 {
	chosen := slices.Clone(m.pages)
	slices.SortFunc(chosen, byWeight)
	sum := 0
	for i, p := range chosen {
		if sum += int(p.weight); p.weight < rare || sum < (i+1)*whole/2 {
			chosen = chosen[:i]
			break
		}
	}
	slices.SortFunc(chosen, func(a, b page) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.number, b.number))
	})
	plan := make([]uint32, len(chosen))
	for i, p := range chosen {
		plan[i] = p.number
	}
	return plan
}

// Child is what a snapshot knows of its own restores before the first: what its
// parent knew, as if from a single restore.
func (m *Model) Child() Model { return Model{runs: min(m.runs, 1), pages: slices.Clone(m.pages)} }

// A model on disk: the magic, runs, the number of pages, and for each page the
// distance of its number from the one before, its weight and its rank.
// Numbers are varints, weight and rank 2 bytes each, little endian.
const magic = "atolltr1"

var errDamaged = errors.New("the model of a snapshot's restores is damaged or of another version")

// AppendBinary appends the model as Parse reads it.
func (m *Model) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, magic...)
	b = binary.AppendUvarint(b, uint64(m.runs))
	b = binary.AppendUvarint(b, uint64(len(m.pages)))
	next := uint32(0)
	for _, p := range m.pages {
		b = binary.AppendUvarint(b, uint64(p.number-next))
		b = binary.LittleEndian.AppendUint16(b, p.weight)
		b = binary.LittleEndian.AppendUint16(b, p.rank)
		next = p.number + 1
	}
	return b, nil
}

// Parse reads a model, which may come from another node.
func Parse(b []byte) (Model, error) {
	var m Model
	if len(b) < len(magic) || string(b[:len(magic)]) != magic {
		return m, errDamaged
	}
	b = b[len(magic):]
	number := func() (v uint64, ok bool) {
		v, n := binary.Uvarint(b)
		b = b[max(n, 0):]
		return v, n > 0
	}
	runs, ok1 := number()
	count, ok2 := number()
	if !ok1 || !ok2 || runs > maxMemory || count > MaxPages || count > 0 && runs == 0 {
		return m, errDamaged
	}
	m.runs = int(runs)
	next := uint64(0)
	for range count {
		skip, ok := number()
		if next += skip; !ok || skip > 1<<32 || next >= 1<<32 || len(b) < 4 {
			return Model{}, errDamaged
		}
		m.pages = append(m.pages, page{uint32(next), binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:])})
		b, next = b[4:], next+1
	}
	if len(b) > 0 {
		return Model{}, errDamaged
	}
	return m, nil
}

// Score says how well a plan foresaw what a restore touched. All are counts of pages.
type Score struct{ Touched, Planned, Hits int }

// Compare holds a plan against the pages that were touched.
func Compare(plan, touched []uint32) Score {
	planned := make(map[uint32]bool, len(plan))
	for _, p := range plan {
		planned[p] = true
	}
	s := Score{Touched: len(touched), Planned: len(plan)}
	for _, p := range touched {
		if planned[p] {
			s.Hits++
		}
	}
	return s
}

// Coverage is which part of the touched pages was planned, from 0 to 1.
func (s Score) Coverage() float64 { return share(s.Hits, s.Touched) }

// Accuracy is which part of the planned pages was touched, from 0 to 1. The rest
// was fetched in vain.
func (s Score) Accuracy() float64 { return share(s.Hits, s.Planned) }

func share(n, of int) float64 {
	if of == 0 {
		return 1
	}
	return float64(n) / float64(of)
}
