package transfer

import (
	"encoding/binary"
	"math/bits"
)

// A patch makes a unit of the new image from one of the base in which little is different: how many changes there are, and
// for each how many bytes stay before it (uvarint) and how many are new, less one (uvarint). Changes and new bytes are kept
// apart, since they compress apart.
type patch struct{ changes, data []byte }

const (
	// maxPatch is up to how many bytes a patch is worth more than a place in a frame with a dictionary, which is smaller
	// where the new bytes are not new elsewhere, and takes a hundred times the processor's time.
	maxPatch = pageSize / 16
	// mergeGap is how many equal bytes between two changes are cheaper to send than a change more.
	mergeGap = 4
	// maxGroupPatches cuts a group that has so many bytes of patches, so that it can be sent and applied while the next one is
	// made; far below maxMap.
	maxGroupPatches = 64 << 10
)

// diff returns the patch that makes page of old; ok is false when it takes more than maxPatch. Both have one length, a
// multiple of 8.
func diff(page, old []byte) (p patch, ok bool) {
	var changes [maxPatch + 2*binary.MaxVarintLen64]byte
	list, data, n, end := changes[:0], 0, 0, 0 // end of the last change
	for at := nextDifference(page, old, 0); at < len(page); {
		begin := at
		stop := at + 1 // after the last byte that differs
		for i := stop; i < len(page) && i-stop < mergeGap; i++ {
			if page[i] != old[i] {
				stop = i + 1
			}
		}
		list = binary.AppendUvarint(binary.AppendUvarint(list, uint64(begin-end)), uint64(stop-begin-1))
		n, data, end = n+1, data+stop-begin, stop
		if len(list)+data > maxPatch {
			return patch{}, false
		}
		at = nextDifference(page, old, stop)
	}
	p.changes = append(binary.AppendUvarint(make([]byte, 0, len(list)+2), uint64(n)), list...)
	p.data = make([]byte, 0, data)
	p.walk(func(at, n int) { p.data = append(p.data, page[at:at+n]...) })
	return p, true
}

// nextDifference returns the first place from at on where page and old differ; their length if they do not.
func nextDifference(page, old []byte, at int) int {
	for ; at&7 != 0 && at < len(page); at++ {
		if page[at] != old[at] {
			return at
		}
	}
	for ; at+8 <= len(page); at += 8 {
		if x := binary.LittleEndian.Uint64(page[at:]) ^ binary.LittleEndian.Uint64(old[at:]); x != 0 {
			return at + bits.TrailingZeros64(x)/8
		}
	}
	return len(page)
}

// walk calls fn for each change. The changes are known to be sound.
func (p patch) walk(fn func(at, n int)) {
	b := p.changes
	next := func() int {
		v, n := binary.Uvarint(b)
		b = b[n:]
		return int(v)
	}
	at := 0
	for range next() {
		at += next()
		n := next() + 1
		fn(at, n)
		at += n
	}
}

// apply turns a unit of the base into the new one.
func (p patch) apply(unit []byte) {
	data := p.data
	p.walk(func(at, n int) { data = data[copy(unit[at:at+n], data):] })
}

// patches reads those of n units, which is the end of a map.
func (c *cursor) patches(n int64, unit int) []patch {
	if n == 0 || c.err != nil || n > int64(len(c.b)) {
		if n > 0 {
			_ = c.fail("patches are missing")
		}
		return nil
	}
	list, sizes := make([]patch, n), make([]int, n)
	for i := range list {
		begin := c.b
		at := 0
		for range c.count(unit) {
			at += c.count(unit)
			size := c.count(unit) + 1
			at, sizes[i] = at+size, sizes[i]+size
			if c.err != nil || at > unit {
				_ = c.fail("a patch is larger than its unit")
				return nil
			}
		}
		list[i].changes = begin[:len(begin)-len(c.b)]
	}
	for i := range list {
		if sizes[i] > len(c.b) {
			_ = c.fail("patches are cut short")
			return nil
		}
		list[i].data, c.b = c.b[:sizes[i]:sizes[i]], c.b[sizes[i]:]
	}
	return list
}
