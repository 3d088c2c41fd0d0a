package transfer

import (
	"context"
	"math/bits"

	"github.com/zeebo/xxh3"
)

// An Index finds content in a base: whole pages by their hash, and pages that have something in common with another by
// anchors. It only proposes; callers compare bytes. It also holds the base's tree. It is built once for an image that
// does not change, can be kept beside it (WriteTo, ReadIndex), and is safe for use by several goroutines.
type Index struct {
	tree    *Tree
	pages   []uint64 // open addressing: 32 bits of hash, page number + 1; 0 is empty
	anchors []uint64 // direct: 24 bits of key, offset of the anchor's end; 0 is empty
	thin    int      // of the anchors only those with so many zero bits below are kept
}

// Limits of an index's tables: 8 bytes a slot. Images of more than 2 GiB have fewer anchors per byte.
const (
	maxPageSlots   = 1 << 26
	maxAnchorSlots = 1 << 24
	maxProbes      = 16
	offsetBits     = 40 // of an offset in an image
	offsetMask     = 1<<offsetBits - 1
)

// tableSizes returns the slots of an index's tables and how thin the anchors are, all of them functions of the size.
func tableSizes(size int64) (pages, anchors, thin int) {
	pow := func(n int64) int { return 1 << bits.Len64(uint64(max(n, 64)-1)) }
	pages = min(maxPageSlots, pow(2*(size/pageSize+1)))
	wanted := pow(size >> anchorBits)
	anchors = min(maxAnchorSlots, wanted)
	return pages, anchors, bits.Len(uint(wanted/anchors)) - 1
}

func newIndex(size int64) *Index {
	pages, anchors, thin := tableSizes(size)
	return &Index{tree: &Tree{size: size}, pages: make([]uint64, pages), anchors: make([]uint64, anchors), thin: thin}
}

// Digest returns the digest of the image that is indexed.
func (x *Index) Digest() Digest { return x.tree.Root() }

// Tree returns the hashes of the image that is indexed.
func (x *Index) Tree() *Tree { return x.tree }

// noOffset says that there is no place.
const noOffset = int64(-1)

// page returns the offsets of pages that probably have the hash; noOffset ends them.
func (x *Index) page(hash uint64) (found [2]int64) {
	n := 0
	mask := uint64(len(x.pages) - 1)
	for i := range uint64(maxProbes) {
		e := x.pages[(hash+i)&mask]
		if e == 0 || n == len(found) {
			break
		}
		if e>>32 == hash>>32 {
			found[n] = int64(uint32(e)-1) * pageSize
			n++
		}
	}
	for ; n < len(found); n++ {
		found[n] = noOffset
	}
	return found
}

// addPage adds a page unless one with the same hash is there, which it reports, or the table is full around it.
func (x *Index) addPage(hash uint64, page uint32) (added bool) {
	mask := uint64(len(x.pages) - 1)
	for i := range uint64(maxProbes) {
		switch e := &x.pages[(hash+i)&mask]; {
		case *e == 0:
			*e = hash>>32<<32 | uint64(page+1)
			return true
		case *e>>32 == hash>>32:
			return false
		}
	}
	return true
}

// anchor returns the offset at which the context of an anchor with the key probably ends, or noOffset.
func (x *Index) anchor(key uint64) int64 {
	if e := x.anchors[x.slot(key)]; e != 0 && e>>offsetBits == key&(1<<(64-offsetBits)-1) {
		return int64(e & offsetMask)
	}
	return noOffset
}

func (x *Index) addAnchor(key uint64, end int64) {
	x.anchors[x.slot(key)] = key<<offsetBits | uint64(end)
}

// slot uses the upper bits of a key; the tag and thinning use the lower ones.
func (x *Index) slot(key uint64) uint64 {
	return key >> (64 - bits.TrailingZeros(uint(len(x.anchors))))
}

// keeps reports whether an anchor is dense enough for the image's size.
func (x *Index) keeps(key uint64) bool { return key>>24&(1<<x.thin-1) == 0 }

// An indexed is what one segment adds to an index.
type indexed struct {
	digest  Digest
	pages   []hashedPage
	anchors []anchor // of all pages, in order
}

type hashedPage struct {
	number  uint32
	anchors int // how many follow in the list
	hash    uint64
}

// BuildIndex reads an image and indexes it. It needs memory of about 1/16 of the image, at most 640 MiB.
func BuildIndex(ctx context.Context, m Image) (*Index, error) { return buildIndex(ctx, m, true) }

// buildIndex builds an index with or without anchors, which take most of the time.
func buildIndex(ctx context.Context, m Image, similar bool) (*Index, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	x := newIndex(m.Size)
	pipe := newPipeline(ctx, func(s indexed) error {
		x.tree.segments = append(x.tree.segments, s.digest)
		at := s.anchors
		for _, p := range s.pages {
			if x.addPage(p.hash, p.number) {
				for _, a := range at[:p.anchors] {
					x.addAnchor(a.key, int64(p.number)*pageSize+int64(a.end))
				}
			}
			at = at[p.anchors:]
		}
		return nil
	})
	for i := range segments(m.Size) {
		if err := pipe.submit(func() (indexed, error) { return x.scan(m, i, similar) }); err != nil {
			break // close says why
		}
	}
	if err := pipe.close(); err != nil {
		return nil, err
	}
	return x, nil
}

// scan reads segment i and finds what an index needs to know of it.
func (x *Index) scan(m Image, i int, similar bool) (indexed, error) {
	buf := getSegment()
	defer putSegment(buf)
	off, n := segment(m.Size, i)
	if err := m.read(buf[:], off); err != nil {
		return indexed{}, err
	}
	s := indexed{digest: hashSegment(buf[:n])}
	if s.digest == zeroSegment() {
		return s, nil
	}
	var list []anchor
	for p := 0; p < n; p += pageSize {
		page := buf[p : p+pageSize]
		if isZero(page) {
			continue
		}
		kept := 0
		if list = list[:0]; similar {
			list = anchors(list, page)
		}
		for _, a := range list {
			if x.keeps(a.key) {
				s.anchors = append(s.anchors, a)
				kept++
			}
		}
		s.pages = append(s.pages, hashedPage{uint32((off + int64(p)) / pageSize), kept, xxh3.Hash(page)})
	}
	return s, nil
}
