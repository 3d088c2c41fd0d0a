package transfer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"
)

// A Reader reads the new image of a delta that was made for random access, decoding only what is asked for. It is safe
// for use by several goroutines at once.
type Reader struct {
	header
	delta io.ReaderAt
	base  Image
	next  Digest
	at    []groupAt

	mu    sync.Mutex
	cache []*frame // the one used last comes last
}

// A groupAt says where a group lies.
type groupAt struct {
	first  int64 // unit
	offset int64 // in the delta
	entry
}

// A frame is a group that is decoded, or being decoded.
type frame struct {
	number int
	once   sync.Once
	group  *group
	starts []int64 // for each run of the group, the number of its first unit
	lits   []int64 // and how many literals come before it
	fixes  []int64 // and how many patched units
	data   []byte
	err    error
}

// cachedFrames bounds what a Reader keeps: four frames, of 4 MiB each by default.
const cachedFrames = 4

// Open prepares reading the new image of a delta of size bytes at random. The base is taken to be the right one if its
// tree says so; a nil tree has all of it read. What is read later is verified by the hashes of its frame.
func Open(ctx context.Context, delta io.ReaderAt, size int64, base Image, tree *Tree) (*Reader, error) {
	h, raw, err := readHeader(io.NewSectionReader(delta, 0, size))
	if err != nil {
		return nil, err
	}
	if !h.baseOnly {
		return nil, ErrNoRandom
	}
	r := &Reader{header: h, delta: delta, base: base}
	if h.base > 0 {
		if _, err := checkBase(ctx, h, base, tree); err != nil {
			return nil, err
		}
	}
	f, err := r.footer(size, raw)
	r.next = f.next
	return r, err
}

// footer reads the footer, finds the groups and verifies the seal.
func (r *Reader) footer(size int64, raw []byte) (f footer, err error) {
	trailer := make([]byte, trailerSize)
	if size < int64(len(raw)+trailerSize) {
		return f, ErrTruncated
	}
	if _, err := r.delta.ReadAt(trailer, size-int64(trailerSize)); err != nil && !errors.Is(err, io.EOF) {
		return f, err
	}
	length := int64(binary.LittleEndian.Uint32(trailer))
	if string(trailer[4:]) != magicEnd {
		return f, ErrTruncated
	}
	begin := size - int64(trailerSize) - length
	if length > maxFooter || begin < int64(len(raw)) {
		return f, fmt.Errorf("%w: a footer of %d bytes", ErrCorrupt, length)
	}
	text := make([]byte, length)
	if _, err := r.delta.ReadAt(text, begin); err != nil && !errors.Is(err, io.EOF) {
		return f, err
	}
	f, sealed, err := parseFooter(text, r.layout)
	if err != nil {
		return f, err
	}
	s := newSealer(raw)
	offset, unit := int64(len(raw)), int64(0)
	for _, e := range f.entries {
		digest, err := r.groupDigest(offset, e)
		if err != nil {
			return f, err
		}
		s.add(digest[:])
		r.at = append(r.at, groupAt{unit, offset, e})
		offset, unit = offset+e.length, unit+e.units
	}
	if s.sum(sealed) != f.seal || offset != begin {
		return f, fmt.Errorf("%w: its parts do not belong together", ErrCorrupt)
	}
	return f, nil
}

// groupDigest reads the digest of a group.
func (r *Reader) groupDigest(offset int64, e entry) (d Digest, err error) {
	head := make([]byte, min(e.length, 1+5*binary.MaxVarintLen64+int64(len(d))))
	if n, err := r.delta.ReadAt(head, offset); n < len(head) {
		return d, cut(err)
	}
	c := cursor{b: head}
	if c.tag() != tagGroup {
		return d, fmt.Errorf("%w: no group where one must begin", ErrCorrupt)
	}
	for range 5 {
		c.uvarint()
	}
	c.digest(&d)
	return d, c.err
}

func (c *cursor) tag() byte {
	if len(c.b) == 0 {
		_ = c.fail("a tag is missing")
		return 0
	}
	t := c.b[0]
	c.b = c.b[1:]
	return t
}

// Size returns the size of the new image in bytes.
func (r *Reader) Size() int64 { return r.layout.next }

// Digest returns the digest of the new image, as the delta says.
func (r *Reader) Digest() Digest { return r.next }

// ReadAt reads the new image, as io.ReaderAt demands.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	n := 0
	for n < len(p) && off < r.Size() {
		got, err := r.some(p[n:min(len(p), n+int(min(int64(len(p)), r.Size()-off)))], off)
		n, off = n+got, off+int64(got)
		if err != nil {
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// some reads bytes that are from one run, at least one.
func (r *Reader) some(p []byte, off int64) (int, error) {
	unit := off / int64(r.unit)
	f, err := r.frame(sort.Search(len(r.at), func(i int) bool { return r.at[i].first > unit }) - 1)
	if err != nil {
		return 0, err
	}
	i := sort.Search(len(f.starts), func(i int) bool { return f.starts[i] > unit }) - 1
	run := f.group.runs[i]
	in := off - f.starts[i]*int64(r.unit)
	p = p[:min(int64(len(p)), run.units*int64(r.unit)-in)]
	switch run.kind {
	case same:
		return len(p), r.base.read(p, off)
	case moved, shifted:
		return len(p), r.base.read(p, run.from+in)
	case patched:
		unit := make([]byte, r.unit)
		begin := in / int64(r.unit) * int64(r.unit)
		if err := r.base.read(unit, run.from+begin); err != nil {
			return 0, err
		}
		f.group.patches[f.fixes[i]+in/int64(r.unit)].apply(unit)
		return copy(p, unit[in-begin:]), nil
	case literal:
		copy(p, f.data[f.lits[i]*int64(r.unit)+in:])
	default: // earlier is refused by parseMap
		clear(p)
	}
	return len(p), nil
}

// frame returns a group, decoded; who asks for one that is being decoded waits.
func (r *Reader) frame(number int) (*frame, error) {
	r.mu.Lock()
	i := slices.IndexFunc(r.cache, func(f *frame) bool { return f.number == number })
	f := &frame{number: number}
	if i >= 0 {
		f = r.cache[i]
		r.cache = slices.Delete(r.cache, i, i+1)
	} else if len(r.cache) == cachedFrames {
		r.cache = slices.Delete(r.cache, 0, 1)
	}
	r.cache = append(r.cache, f)
	r.mu.Unlock()
	f.once.Do(func() {
		if f.err = r.load(f); f.err != nil { // another try may do better
			r.mu.Lock()
			r.cache = slices.DeleteFunc(r.cache, func(c *frame) bool { return c == f })
			r.mu.Unlock()
		}
	})
	return f, f.err
}

// load decodes and verifies a group.
func (r *Reader) load(f *frame) error {
	at := r.at[f.number]
	b := &byteReader{r: bufio.NewReader(io.NewSectionReader(r.delta, at.offset, at.length))}
	if _, err := b.ReadByte(); err != nil { // the tag, which footer has seen
		return cut(err)
	}
	rec, err := readRecord(b, r.layout)
	if err != nil {
		return err
	}
	if b.n != at.length || rec.units != at.units {
		return fmt.Errorf("%w: a group is not what the footer says", ErrCorrupt)
	}
	g, raw, err := rec.open(at.first, r.layout)
	if err != nil {
		return err
	}
	if f.data, err = rec.literal(g, raw, r.layout, nil, r.base); err != nil {
		return err
	}
	f.group = g
	unit, lits, fixes := at.first, int64(0), int64(0)
	for _, run := range g.runs {
		f.starts, f.lits, f.fixes = append(f.starts, unit), append(f.lits, lits), append(f.fixes, fixes)
		if unit += run.units; run.kind == literal {
			lits += run.units
		}
		if run.kind == patched {
			fixes += run.units
		}
	}
	return nil
}
