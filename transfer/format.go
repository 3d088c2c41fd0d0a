package transfer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// The format of a delta; numbers are unsigned varints unless said otherwise.
//
//	header  "ATLD", version (1 byte), length (1 byte), then: flags, unit, frame, size of the new image,
//	        size of the base, digest of the base (32 bytes, if there is one)
//	groups  tagGroup, units, literals, size of the map, packed size of the map, packed size of the frame,
//	        digest (32 bytes) of map, literals, packed map and packed frame; packed map, packed frame, both as frames of
//	        package pack, whose first byte says how they are packed
//	footer  tagFooter, number of groups, for each group the length of its record and its units;
//	        digest of the new image, seal (32 bytes each)
//	trailer length of the footer with its tag (4 bytes, little endian), "DLTA"
//
// The seal is a hash of the header, the digests of all groups, and the footer before it. So everything is under a hash.
const (
	magic        = "ATLD"
	magicEnd     = "DLTA"
	version      = 3
	trailerSize  = 4 + len(magicEnd)
	maxHeader    = len(magic) + 2 + 255
	maxFooter    = 64 << 20
	tagGroup     = 'G'
	tagFooter    = 'F'
	sealContext  = "atoll.run 2026 transfer delta seal"
	flagBaseOnly = 1
)

// A header begins a delta.
type header struct {
	layout
	baseDigest Digest // zero without a base
}

func (h header) append(b []byte) []byte {
	flags := uint64(0)
	if h.baseOnly {
		flags |= flagBaseOnly
	}
	var f []byte
	for _, v := range []uint64{flags, uint64(h.unit), uint64(h.frame), uint64(h.next), uint64(h.base)} {
		f = binary.AppendUvarint(f, v)
	}
	if h.base > 0 {
		f = append(f, h.baseDigest[:]...)
	}
	b = append(append(b, magic...), version, byte(len(f)))
	return append(b, f...)
}

// readHeader reads a header and returns its bytes too.
func readHeader(r io.Reader) (h header, raw []byte, err error) {
	raw = make([]byte, len(magic)+2, maxHeader)
	if _, err := io.ReadFull(r, raw); err != nil {
		return h, nil, cut(err)
	}
	if string(raw[:len(magic)]) != magic || raw[len(magic)] != version {
		return h, nil, ErrVersion
	}
	raw = raw[:len(raw)+int(raw[len(magic)+1])]
	if _, err := io.ReadFull(r, raw[len(magic)+2:]); err != nil {
		return h, nil, cut(err)
	}
	c := cursor{b: raw[len(magic)+2:]}
	flags := c.count(flagBaseOnly) // a flag that we do not know changes what the rest means
	h.baseOnly = flags&flagBaseOnly != 0
	h.unit, h.frame = c.count(maxUnit), c.count(maxFrame)
	h.next, h.base = int64(c.count(maxImage)), int64(c.count(maxImage))
	if h.base > 0 {
		c.digest(&h.baseDigest)
	}
	if c.err != nil {
		return h, nil, c.err
	}
	if h.unit < pageSize || h.unit&(h.unit-1) != 0 || h.frame < h.unit || len(c.b) > 0 {
		return h, nil, fmt.Errorf("%w: sizes in the header make no sense", ErrCorrupt)
	}
	return h, raw, nil
}

// cut says of what ended too early that it did.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return err
}

func (c *cursor) digest(d *Digest) {
	if len(c.b) < len(d) {
		_ = c.fail("a digest is missing")
		return
	}
	c.b = c.b[copy(d[:], c.b):]
}

// A record is a group as it lies in a delta.
type record struct {
	units, literals             int64
	mapSize, mapPacked, payload int
	digest                      Digest
	packedMap, frame            []byte
	dictionary                  int // bytes, known to the encoder
}

// hash returns the digest of a group: of what it means, and of how that is packed, which several ways could say.
func (r *record) hash(rawMap, literals []byte) (d Digest) {
	h := blake3.New()
	for _, p := range [][]byte{rawMap, literals, r.packedMap, r.frame} {
		_, _ = h.Write(p) // a hash does not fail
	}
	h.Sum(d[:0])
	return d
}

func (r *record) append(b []byte) []byte {
	b = append(b, tagGroup)
	for _, v := range []uint64{uint64(r.units), uint64(r.literals), uint64(r.mapSize), uint64(len(r.packedMap)), uint64(len(r.frame))} {
		b = binary.AppendUvarint(b, v)
	}
	b = append(b, r.digest[:]...)
	b = append(b, r.packedMap...)
	return append(b, r.frame...)
}

// maxPacked bounds what n bytes become when they do not compress.
func maxPacked(n int) int { return n + n>>7 + 64 }

// A byteReader counts what it reads, and keeps the last failure of reading a byte.
type byteReader struct {
	r interface {
		io.Reader
		io.ByteReader
	}
	n   int64
	err error // of r
}

func (b *byteReader) ReadByte() (byte, error) {
	c, err := b.r.ReadByte()
	if err == nil {
		b.n++
	}
	b.err = err
	return c, err
}

func (b *byteReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += int64(n)
	return n, err
}

// count reads a number of at most limit.
func (b *byteReader) count(limit int) (int, error) {
	v, err := binary.ReadUvarint(b)
	if b.err != nil {
		return 0, cut(b.err)
	}
	if err != nil || v > uint64(limit) {
		return 0, fmt.Errorf("%w: a number is too large", ErrCorrupt)
	}
	return int(v), nil
}

// readRecord reads a group after its tag.
func readRecord(b *byteReader, l layout) (r record, err error) {
	sizes := [5]int{}
	for i, limit := range [5]int{maxGroupUnits, l.frame / l.unit, maxMap, maxPacked(maxMap), maxPacked(l.frame)} {
		if sizes[i], err = b.count(limit); err != nil {
			return r, err
		}
	}
	r = record{units: int64(sizes[0]), literals: int64(sizes[1]), mapSize: sizes[2], mapPacked: sizes[3], payload: sizes[4]}
	if r.units == 0 || r.mapPacked > maxPacked(r.mapSize) || r.payload > maxPacked(int(r.literals)*l.unit) {
		return r, fmt.Errorf("%w: sizes of a group make no sense", ErrCorrupt)
	}
	if _, err := io.ReadFull(b, r.digest[:]); err != nil {
		return r, cut(err)
	}
	body := make([]byte, r.mapPacked+r.payload)
	if _, err := io.ReadFull(b, body); err != nil {
		return r, cut(err)
	}
	r.packedMap, r.frame = body[:r.mapPacked], body[r.mapPacked:]
	return r, nil
}

// An entry of the footer says how long a group's record is and how many units it has.
type entry struct{ length, units int64 }

// A footer ends a delta.
type footer struct {
	entries []entry
	next    Digest // of the new image
	seal    Digest
}

// A sealer hashes the header and the digests of the groups as they go by.
type sealer struct{ h *blake3.Hasher }

func newSealer(header []byte) sealer {
	s := sealer{blake3.NewDeriveKey(sealContext)}
	s.add(header)
	return s
}

func (s sealer) add(p []byte) { _, _ = s.h.Write(p) } // a hash does not fail

func (s sealer) sum(footer []byte) (d Digest) {
	s.add(footer)
	s.h.Sum(d[:0])
	return d
}

// append encodes the footer, sealed, and the trailer.
func (f *footer) append(b []byte, s sealer) []byte {
	begin := len(b)
	b = append(b, tagFooter)
	b = binary.AppendUvarint(b, uint64(len(f.entries)))
	for _, e := range f.entries {
		b = binary.AppendUvarint(b, uint64(e.length))
		b = binary.AppendUvarint(b, uint64(e.units))
	}
	b = append(b, f.next[:]...)
	f.seal = s.sum(b[begin:])
	b = append(b, f.seal[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(b)-begin))
	return append(b, magicEnd...)
}

// parseFooter decodes a footer with its tag, which must end b, and checks that its groups make up the image. The seal
// remains to be compared; sealed is what it is of.
func parseFooter(b []byte, l layout) (f footer, sealed []byte, err error) {
	if len(b) == 0 || b[0] != tagFooter {
		return f, nil, fmt.Errorf("%w: no footer", ErrCorrupt)
	}
	c := cursor{b: b[1:]}
	n := c.count(len(b) / 2)
	f.entries = make([]entry, 0, n)
	units := int64(0)
	for range n {
		e := entry{int64(c.count(maxImage)), int64(c.count(maxGroupUnits))}
		units += e.units
		f.entries = append(f.entries, e)
	}
	c.digest(&f.next)
	sealed = b[:len(b)-len(c.b)]
	c.digest(&f.seal)
	if c.err == nil && (len(c.b) > 0 || units != l.units()) {
		return f, nil, fmt.Errorf("%w: the groups are not the whole image", ErrCorrupt)
	}
	return f, sealed, c.err
}
