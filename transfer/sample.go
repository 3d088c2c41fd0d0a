package transfer

import (
	"context"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/atoll-run/atoll/chunk/pack"
)

const (
	// sampleBlock is read in one piece at each place of a sample, in bytes.
	sampleBlock = 64 << 10
	// sampleCount is how many places a sample has at most.
	sampleCount = 256
	// sampleNovel bounds the novel bytes that are compressed on trial.
	sampleNovel = 2 << 20
)

// Sample looks at up to 16 MiB of the new image, spread evenly, and says what it has in common with the base. index may
// be nil, when the base has none: then content that was moved is not found, and what is similar is taken to be at the
// same offset.
func Sample(ctx context.Context, base, next Image, index *Index) (Similarity, error) {
	s := Similarity{Size: next.Size, Base: base.Size, Indexed: index != nil, Plain: 1, Alike: 1, All: 1}
	if index != nil && index.tree.size != base.Size {
		return s, fmt.Errorf("%w: it is of an image of %d bytes, not %d", ErrIndex, index.tree.size, base.Size)
	}
	if base.At == nil {
		base, index, s.Base = Image{}, nil, 0
	}
	t := &trial{scanner: scanner{next: next, base: base, index: index, similar: index != nil}, votes: map[int64]int{}}
	blocks := next.units(sampleBlock)
	step := max(1, (blocks+sampleCount-1)/sampleCount)
	for b := step / 2; b < blocks; b += step {
		if err := ctx.Err(); err != nil {
			return s, err
		}
		if err := t.block(b * sampleBlock); err != nil {
			return s, err
		}
	}
	total := 0
	for _, n := range t.found {
		total += n
	}
	if total == 0 {
		s.Same = 1
		return s, nil
	}
	part := func(k kind) float64 { return float64(t.found[k]) / float64(total) }
	s.Same, s.Zero, s.Moved, s.Shifted, s.Patched, s.Novel = part(same), part(zero), part(moved), part(shifted), part(patched), part(literal)
	if n := t.found[patched]; n > 0 {
		s.Patch = float64(t.patches) / float64(n*pageSize)
	}
	s.Empty = float64(t.empty) / float64(total)
	return s, t.ratios(&s)
}

// A trial scans the blocks of a sample.
type trial struct {
	scanner
	found   [kinds]int // pages
	empty   int        // pages
	patches int        // bytes of patches
	novel   []byte     // some of the literals
	all     []byte     // one page of each block, unless it is zero
	votes   map[int64]int
}

// block scans one block of the sample.
func (t *trial) block(off int64) error {
	n := int(min(sampleBlock, t.next.Size-off))
	padded := (n + pageSize - 1) / pageSize * pageSize
	data, old := make([]byte, padded), make([]byte, padded)
	if err := t.next.read(data, off); err != nil {
		return err
	}
	if t.base.At != nil {
		if err := t.base.read(old, off); err != nil {
			return err
		}
	}
	places, _, err := t.compare(data, old, off)
	if err != nil {
		return err
	}
	taken := false
	for i, p := range places {
		t.found[p.kind]++
		t.patches += len(p.patch.changes) + len(p.patch.data)
		page := data[i*pageSize : (i+1)*pageSize]
		if isZero(page) {
			t.empty++
		} else if !taken {
			t.all, taken = append(t.all, page...), true
		}
		if p.kind != literal || len(t.novel) >= sampleNovel {
			continue
		}
		t.novel = append(t.novel, page...)
		for _, v := range p.votes {
			t.votes[v/pageSize]++
		}
		if at := off + int64(i)*pageSize; p.beside || t.index == nil && at < t.base.Size {
			t.votes[at/pageSize] += sameVotes
		}
	}
	return nil
}

// ratios compresses what was taken, on trial. Without novel bytes theirs do not matter.
func (t *trial) ratios(s *Similarity) error {
	g := group{fromBase: choose(t.votes, maxDictionary/pageSize)}
	dictionary, err := g.dictionary(nil, nil, t.base.read)
	if err != nil {
		return err
	}
	for _, part := range []struct {
		data, dictionary []byte
		level            zstd.EncoderLevel
		ratio            *float64
	}{
		{t.all, nil, zstd.SpeedDefault, &s.All},
		{t.novel, nil, zstd.SpeedDefault, &s.Plain},
		{t.novel, dictionary, zstd.SpeedBetterCompression, &s.Alike},
	} {
		if len(part.data) == 0 {
			continue
		}
		packed, err := pack.AppendFrame(nil, part.data, pack.With{Dictionary: part.dictionary}, pack.Plan{Coder: pack.Zstd, Level: part.level})
		if err != nil {
			return err
		}
		*part.ratio = min(1, float64(len(packed))/float64(len(part.data)))
	}
	s.Alike = min(s.Alike, s.Plain)
	return nil
}
