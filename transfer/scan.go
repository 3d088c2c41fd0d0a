package transfer

import "github.com/zeebo/xxh3"

// A kind says where the bytes of a unit come from. The numbers are part of the format.
type kind byte

const (
	same    kind = iota // the base, at the same offset
	zero                // nowhere
	moved               // the base, at another offset that differs by whole units
	shifted             // the base, at any offset
	earlier             // the new image, at an earlier unit
	literal             // the literals of the group
	patched             // the base, at any offset, but for a few bytes
	kinds
)

// A place is where one unit comes from.
type place struct {
	kind kind
	from int64 // offset in the base or in the new image; unused for zero and literal
	hash uint64
	// For a patched page, what is different.
	patch patch
	// For a literal page, what it has in common with others.
	anchors []anchor
	votes   []int64 // offsets of pages in the base, one for each anchor found there
	beside  bool    // the base has a page at the same offset, which counts as sameVotes
}

// A scanned is one segment of the new image with what was found about it without regard to the rest of it.
type scanned struct {
	index  int
	data   *[segmentSize]byte // padded with zeros; returned to the pool by who takes it
	size   int                // in bytes, without padding
	digest Digest
	places []place
}

// sameVotes is the weight of the page at the same offset in the base, which is similar more often than not.
const sameVotes = 9

// A scanner compares segments of the new image with the base.
type scanner struct {
	next    Image
	base    Image
	index   *Index // of the base; nil finds only what is at the same offset
	similar bool   // look for similar pages too
}

// segment reads and compares one segment.
func (s *scanner) segment(i int) (scanned, error) {
	data, old := getSegment(), getSegment()
	defer putSegment(old)
	off, n := segment(s.next.Size, i)
	r := scanned{index: i, data: data, size: n}
	if err := s.next.read(data[:], off); err != nil {
		return r, err
	}
	padded := (n + pageSize - 1) / pageSize * pageSize
	if s.base.At != nil && off < s.base.Size {
		if err := s.base.read(old[:padded], off); err != nil {
			return r, err
		}
	}
	var equal bool
	var err error
	if r.places, equal, err = s.compare(data[:padded], old[:padded], off); err != nil {
		return r, err
	}
	r.digest = s.digest(&r, equal)
	return r, nil
}

// compare finds out where the pages of data come from, which lies at an offset in the new image; old are the base's bytes
// there. It also reports whether all of them are the same.
func (s *scanner) compare(data, old []byte, off int64) (places []place, equal bool, err error) {
	f := finder{scanner: s, peek: peeker{image: s.base}, next: noOffset}
	places, equal = make([]place, 0, len(data)/pageSize), true
	for p := 0; p < len(data); p += pageSize {
		at := off + int64(p)
		// A page that straddles the base's end is compared with its padding on both sides.
		inBase := s.base.At != nil && at < s.base.Size
		page := data[p : p+pageSize]
		if inBase && string(page) == string(old[p:p+pageSize]) {
			places = append(places, place{kind: same, from: at})
			f.next = noOffset
			continue
		}
		equal = false
		if isZero(page) {
			places = append(places, place{kind: zero})
			continue
		}
		var beside []byte
		if inBase && at+pageSize <= s.base.Size {
			beside = old[p : p+pageSize]
		}
		found, err := f.find(page, at, beside)
		if err != nil {
			return nil, false, err
		}
		if found.kind == literal && s.similar && inBase && !isZero(old[p:p+pageSize]) {
			found.beside = true
		}
		places = append(places, found)
	}
	return places, equal, nil
}

// digest returns the hash of the segment, from the base's tree if it is all the same.
func (s *scanner) digest(r *scanned, allSame bool) Digest {
	if allSame && s.index != nil {
		if _, n := segment(s.base.Size, r.index); n == r.size {
			return s.index.tree.segments[r.index]
		}
	}
	return hashSegment(r.data[:r.size])
}

// A finder looks up the pages of one segment in the base.
type finder struct {
	*scanner
	peek peeker
	next int64 // where the base goes on after the page found last, or noOffset
}

// find returns where a page at an offset of the new image comes from that is neither zero nor the same; beside is the base's
// page there, or nil.
func (f *finder) find(page []byte, off int64, beside []byte) (place, error) {
	if f.index == nil {
		return place{kind: literal, hash: xxh3.Hash(page)}, nil
	}
	// What was moved was moved together, as a rule.
	if ok, err := f.holds(f.next, page); ok || err != nil {
		return f.found(f.next), err
	}
	l := place{kind: literal, hash: xxh3.Hash(page)}
	for _, at := range f.index.page(l.hash) {
		if ok, err := f.holds(at, page); ok || err != nil {
			return f.found(at), err
		}
	}
	if off+pageSize <= f.scanner.next.Size { // a page that is there in part only is never patched
		// What was moved together was changed a little here and there; else the page was changed where it is.
		if p, ok, err := f.patched(f.next, page); ok || err != nil {
			return p, err
		}
		if beside != nil {
			if d, ok := diff(page, beside); ok {
				f.next = noOffset
				return place{kind: patched, from: off, patch: d}, nil
			}
		}
	}
	if f.next != noOffset {
		f.next += pageSize // this page may have been put in the place of another
	}
	if !f.similar {
		return l, nil
	}
	l.anchors = anchors(nil, page)
	first, last := noOffset, noOffset
	for i, a := range l.anchors {
		if !f.index.keeps(a.key) {
			continue
		}
		end := f.index.anchor(a.key)
		if end == noOffset {
			continue
		}
		l.anchors[i].inBase = true
		l.votes = append(l.votes, (end-1)/pageSize*pageSize)
		if last = end - int64(a.end); first == noOffset {
			first = last
		}
	}
	// The first and the last anchor agree on where the whole page would begin.
	if first == last {
		if ok, err := f.holds(first, page); ok || err != nil {
			return f.found(first), err
		}
		if off+pageSize <= f.scanner.next.Size {
			if p, ok, err := f.patched(first, page); ok || err != nil {
				return p, err
			}
		}
	}
	return l, nil
}

// patched reports whether the base has a page at an offset but for a few bytes.
func (f *finder) patched(at int64, page []byte) (place, bool, error) {
	if at < 0 || at+pageSize > f.base.Size {
		return place{}, false, nil
	}
	b, err := f.peek.at(at, pageSize)
	if err != nil {
		return place{}, false, err
	}
	d, ok := diff(page, b)
	if ok {
		f.next = at + pageSize
	}
	return place{kind: patched, from: at, patch: d}, ok, nil
}

// found returns the place of a page that the base has at an offset.
func (f *finder) found(at int64) place {
	f.next = at + pageSize
	if at%pageSize == 0 {
		return place{kind: moved, from: at}
	}
	return place{kind: shifted, from: at}
}

// holds reports whether the base has a page at an offset. Only whole pages count, except an aligned last one.
func (f *finder) holds(at int64, page []byte) (bool, error) {
	if at < 0 || at >= f.base.Size || at%pageSize != 0 && at+pageSize > f.base.Size {
		return false, nil
	}
	b, err := f.peek.at(at, pageSize)
	return err == nil && string(b) == string(page), err
}
