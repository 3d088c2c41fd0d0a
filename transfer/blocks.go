package transfer

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"
)

// DefaultBlock is the size of the blocks of a Signature, in bytes.
const DefaultBlock = 64 << 10

// A Signature describes a base that the sender does not hold, block by block: a fast hash to scan for and a strong one
// to be sure. The receiver makes it and sends it first; 64 KB blocks cost 40 bytes each.
type Signature struct {
	block  int
	size   int64
	root   Digest   // of the base
	weak   []uint64 // XXH3 of each block, the last one padded with zeros
	strong []Digest // BLAKE3 of the same
}

// NewSignature reads an image and makes its signature with blocks of a size that is a power of two from 4 KB to 1 MiB;
// 0 means DefaultBlock.
func NewSignature(ctx context.Context, m Image, block int) (*Signature, error) {
	block, err := blockSize(block)
	if err != nil {
		return nil, err
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	s, tree := &Signature{block: block, size: m.Size}, &Tree{size: m.Size}
	type hashes struct {
		weak   []uint64
		strong []Digest
		whole  Digest
	}
	pipe := newPipeline(ctx, func(h hashes) error {
		s.weak, s.strong = append(s.weak, h.weak...), append(s.strong, h.strong...)
		tree.segments = append(tree.segments, h.whole)
		return nil
	})
	for i := range segments(m.Size) {
		if err := pipe.submit(func() (h hashes, err error) {
			buf := getSegment()
			defer putSegment(buf)
			off, n := segment(m.Size, i)
			if err := m.read(buf[:], off); err != nil {
				return h, err
			}
			h.whole = hashSegment(buf[:n])
			for p := 0; p < n; p += block {
				h.weak = append(h.weak, xxh3.Hash(buf[p:p+block]))
				h.strong = append(h.strong, blake3.Sum256(buf[p:p+block]))
			}
			return h, nil
		}); err != nil {
			break // close says why
		}
	}
	if err := pipe.close(); err != nil {
		return nil, err
	}
	s.root = tree.Root()
	return s, nil
}

func blockSize(block int) (int, error) {
	if block == 0 {
		return DefaultBlock, nil
	}
	if block < pageSize || block > maxUnit || bits.OnesCount(uint(block)) != 1 {
		return 0, fmt.Errorf("%w: a block of %d bytes; it must be a power of two from %d to %d", ErrOption, block, pageSize, maxUnit)
	}
	return block, nil
}

const (
	signatureMagic   = "ATLS"
	signatureVersion = 1
	signatureHead    = len(signatureMagic) + 1 + 4 + 8 + 32
)

// Append encodes the signature: "ATLS", version (1 byte), size of a block (4 bytes), of the base (8), digest of the base,
// for each block its XXH3 (8) and its BLAKE3 hash, and the BLAKE3 hash of all that; numbers are little endian.
func (s *Signature) Append(b []byte) []byte {
	begin := len(b)
	b = append(append(b, signatureMagic...), signatureVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(s.block))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.size))
	b = append(b, s.root[:]...)
	for i := range s.weak {
		b = binary.LittleEndian.AppendUint64(b, s.weak[i])
		b = append(b, s.strong[i][:]...)
	}
	sum := blake3.Sum256(b[begin:])
	return append(b, sum[:]...)
}

// ParseSignature decodes what Append made.
func ParseSignature(b []byte) (*Signature, error) {
	if len(b) < signatureHead+32 {
		return nil, ErrTruncated
	}
	if string(b[:4]) != signatureMagic || b[4] != signatureVersion {
		return nil, ErrVersion
	}
	body := b[:len(b)-32]
	if sum := blake3.Sum256(body); string(sum[:]) != string(b[len(body):]) {
		return nil, fmt.Errorf("%w: the hash of a signature is another", ErrCorrupt)
	}
	s := &Signature{size: int64(binary.LittleEndian.Uint64(b[9:]))}
	var err error
	if s.block, err = blockSize(int(binary.LittleEndian.Uint32(b[5:]))); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	m := Image{Size: s.size}
	if err := m.check(); err != nil {
		return nil, err
	}
	copy(s.root[:], b[17:])
	body = body[signatureHead:]
	if int64(len(body)) != m.units(s.block)*40 {
		return nil, fmt.Errorf("%w: a signature has too few or too many blocks", ErrCorrupt)
	}
	for ; len(body) > 0; body = body[40:] {
		s.weak = append(s.weak, binary.LittleEndian.Uint64(body))
		s.strong = append(s.strong, Digest(body[8:40]))
	}
	return s, nil
}

// EncodeBlocks writes to w a delta that turns the base that a signature describes into next. Blocks that the base has are
// known by their strong hash; all others are sent.
func EncodeBlocks(ctx context.Context, w io.Writer, base *Signature, next Image, o Options) (Stats, error) {
	frame, err := o.frame()
	if err != nil {
		return Stats{}, err
	}
	if err := next.check(); err != nil {
		return Stats{}, err
	}
	h := header{baseDigest: base.root, layout: layout{
		unit: base.block, frame: max(frame/base.block*base.block, base.block), next: next.Size, base: base.size, baseOnly: o.Random,
	}}
	if base.size == 0 {
		h.baseDigest = Digest{}
	}
	b := &blockScanner{next: next, base: base, number: make(map[uint64]int64, len(base.weak))}
	for i := len(base.weak) - 1; i >= 0; i-- {
		b.number[base.weak[i]] = int64(i) // the first of several
	}
	o.Method = Dedup
	return encode(ctx, w, h, Image{}, next, o, b.segment)
}

// A blockScanner finds the blocks of the new image in a signature.
type blockScanner struct {
	next   Image
	base   *Signature
	number map[uint64]int64 // of the block with a weak hash
}

// segment reads one segment and looks up its blocks.
func (b *blockScanner) segment(i int) (scanned, error) {
	data, block := getSegment(), b.base.block
	off, n := segment(b.next.Size, i)
	r := scanned{index: i, data: data, size: n}
	if err := b.next.read(data[:], off); err != nil {
		return r, err
	}
	r.digest = hashSegment(data[:n])
	for p := 0; p < n; p += block {
		r.places = append(r.places, b.place(data[p:p+block], (off+int64(p))/int64(block)))
	}
	return r, nil
}

// place finds out where a block comes from.
func (b *blockScanner) place(p []byte, number int64) place {
	if isZero(p) {
		return place{kind: zero}
	}
	l := place{kind: literal, hash: xxh3.Hash(p)}
	here := number < int64(len(b.base.weak)) && b.base.weak[number] == l.hash
	there, known := b.number[l.hash]
	if !here && !known {
		return l
	}
	switch strong := Digest(blake3.Sum256(p)); {
	case here && b.base.strong[number] == strong:
		return place{kind: same}
	case known && b.base.strong[there] == strong:
		return place{kind: moved, from: there * int64(b.base.block)}
	}
	return l
}
