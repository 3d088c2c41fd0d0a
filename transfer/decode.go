package transfer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/atoll-run/atoll/chunk/pack"
)

// An Output is where an image is rebuilt. What was written is read again, since later parts refer to earlier ones.
type Output interface {
	io.WriterAt
	io.ReaderAt
}

// DecodeOptions of Decode. The zero value is good.
type DecodeOptions struct {
	// Base is the tree of the base, when it is known, which saves reading all of it.
	Base *Tree
	// Want is the digest that the image must have, when it is known from elsewhere; zero takes what the delta says.
	Want Digest
	// MaxSize bounds the image, in bytes; 0 leaves it at 1 TiB.
	MaxSize int64
	// Unsynced has DecodeFile return before the file is on disk, though on its way there: the caller syncs it.
	Unsynced bool
	// Sparse says that the output reads as zero already, so that zero pages are not written.
	Sparse bool
}

// Result of Decode.
type Result struct {
	Tree *Tree // of the new image
	Read int64 // bytes of the delta
}

// Decode reads a delta from r and rebuilds the image in out, whose size the caller sets. Nothing after the delta is used,
// though it may be read ahead. It has verified all of the image when it returns nil; before that, what is in out must
// not be used.
func Decode(ctx context.Context, r io.Reader, base Image, out Output, o DecodeOptions) (Result, error) {
	if base.At == nil {
		base = Image{}
	}
	b := &byteReader{r: bufio.NewReaderSize(r, 64<<10)}
	h, raw, err := readHeader(b)
	if err != nil {
		return Result{}, err
	}
	if o.MaxSize > 0 && h.next > o.MaxSize {
		return Result{}, fmt.Errorf("%w: %d bytes, not %d", ErrTooLarge, h.next, o.MaxSize)
	}
	if h.base > 0 {
		if o.Base, err = checkBase(ctx, h, base, o.Base); err != nil {
			return Result{}, err
		}
	} else {
		base, o.Base = Image{}, nil
	}
	d := &decoder{header: h, in: b, base: base, baseTree: o.Base, sparse: o.Sparse, sealer: newSealer(raw), out: out}
	d.tree = &Tree{size: h.next}
	d.hashing = newPipeline(ctx, func(s Digest) error {
		d.tree.segments = append(d.tree.segments, s)
		return nil
	})
	if err := d.groups(); err != nil {
		d.hashing.abort(err)
		return Result{Read: b.n}, err
	}
	if err := d.hashing.close(); err != nil {
		return Result{Read: b.n}, err
	}
	d.footer.next = d.tree.Root()
	if o.Want != (Digest{}) && o.Want != d.footer.next {
		return Result{Read: b.n}, fmt.Errorf("%w: it makes %s, not %s", ErrCorrupt, d.footer.next, o.Want)
	}
	return Result{d.tree, b.n}, d.end()
}

// checkBase makes sure that the base is the one that the delta was made against.
func checkBase(ctx context.Context, h header, base Image, t *Tree) (*Tree, error) {
	if base.At == nil || base.Size != h.base {
		return nil, fmt.Errorf("%w: it needs %s of %d bytes", ErrWrongBase, h.baseDigest, h.base)
	}
	if t == nil {
		var err error
		if t, err = HashImage(ctx, base); err != nil {
			return nil, err
		}
	}
	if got := t.Root(); t.size != base.Size || got != h.baseDigest {
		return nil, fmt.Errorf("%w: it needs %s, this is %s", ErrWrongBase, h.baseDigest, got)
	}
	return t, nil
}

// A decoder rebuilds one image, from its beginning to its end, on one goroutine; segments that are complete are hashed
// on others.
type decoder struct {
	header
	in       *byteReader
	base     Image
	baseTree *Tree
	sparse   bool
	out      Output
	sealer   sealer
	footer   footer
	tree     *Tree
	hashing  *pipeline[Digest]

	// The segment that is being put together.
	buf   *[segmentSize]byte // nil before its first byte
	at    int64              // how far the image is
	fresh bool               // something in it is not the same as in the base

	patches []patch // of the group's units that are yet to come
}

// groups decodes all groups.
func (d *decoder) groups() error {
	defer func() {
		if d.buf != nil {
			putSegment(d.buf)
		}
	}()
	for unit := int64(0); unit < d.units(); {
		tag, err := d.in.ReadByte()
		switch {
		case err != nil:
			return cut(err)
		case tag != tagGroup:
			return fmt.Errorf("%w: no group where one must begin", ErrCorrupt)
		}
		begin := d.in.n - 1
		r, err := readRecord(d.in, d.layout)
		if err != nil {
			return err
		}
		if unit+r.units > d.units() {
			return fmt.Errorf("%w: more units than the image has", ErrCorrupt)
		}
		d.sealer.add(r.digest[:])
		d.footer.entries = append(d.footer.entries, entry{d.in.n - begin, r.units})
		if err := d.group(unit, &r); err != nil {
			return err
		}
		unit += r.units
	}
	return nil
}

// group decodes one group.
func (d *decoder) group(first int64, r *record) error {
	g, raw, err := r.open(first, d.layout)
	if err != nil {
		return err
	}
	data, err := r.literal(g, raw, d.layout, d.readNew, d.base)
	if err != nil {
		return err
	}
	d.patches = g.patches
	for _, run := range g.runs {
		if err := d.hashing.ctx.Err(); err != nil {
			return context.Cause(d.hashing.ctx)
		}
		if data, err = d.run(run, data); err != nil {
			return err
		}
	}
	return nil
}

// open unpacks and checks a group's map, and returns its bytes too.
func (r *record) open(first int64, l layout) (*group, []byte, error) {
	raw, err := unpack(r.packedMap, pack.With{}, r.mapSize)
	if err != nil {
		return nil, nil, err
	}
	g := &group{first: first, units: r.units, literals: r.literals}
	return g, raw, g.parseMap(raw, l)
}

// literal unpacks a group's literals and verifies them and the map.
func (r *record) literal(g *group, raw []byte, l layout, next func([]byte, int64) error, base Image) ([]byte, error) {
	var data []byte
	if r.literals > 0 {
		var with pack.With
		var err error
		if pages := pageCount(g.fromNew) + pageCount(g.fromBase); pages > 0 {
			if with.Dictionary, err = g.dictionary(make([]byte, 0, pages*pageSize), next, base.read); err != nil {
				return nil, err
			}
		}
		if pack.NeedsPrior(r.frame) {
			if with.Prior, err = g.prior(l, base); err != nil {
				return nil, err
			}
		}
		if data, err = unpack(r.frame, with, int(r.literals)*l.unit); err != nil {
			return nil, err
		}
	}
	if r.hash(raw, data) != r.digest {
		return nil, fmt.Errorf("%w: a frame is not what its hash says", ErrCorrupt)
	}
	return data, nil
}

// unpack opens a frame of package pack; the caller has bounded its size.
func unpack(frame []byte, with pack.With, size int) ([]byte, error) {
	data, err := pack.OpenFrame(frame, with, size)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return data, nil
}

// run puts one run into the image; data are the literals left, and it returns those after it.
func (d *decoder) run(r run, data []byte) ([]byte, error) {
	left := min(r.units*int64(d.unit), d.next-d.at) // the last unit may be there in part
	for left > 0 {
		if d.buf == nil {
			d.buf, d.fresh = getSegment(), false
		}
		_, size := segment(d.next, int(d.at/segmentSize))
		in := int(d.at % segmentSize)
		n := min(left, int64(size-in))
		if r.kind == earlier {
			n = min(n, int64(d.unit)-d.at%int64(d.unit)) // a unit may be what the next one refers to
		}
		piece := d.buf[in : in+int(n)]
		switch r.kind {
		case same:
			r.from = d.at
			fallthrough
		case moved, shifted:
			if err := d.base.read(piece, r.from); err != nil {
				return nil, err
			}
		case patched: // runs of them are whole units, and segments are too
			if err := d.base.read(piece, r.from); err != nil {
				return nil, err
			}
			for at := 0; at < len(piece); at += d.unit {
				d.patches[0].apply(piece[at : at+d.unit])
				d.patches = d.patches[1:]
			}
		case zero:
			clear(piece)
		case earlier:
			if err := d.readNew(piece, r.from); err != nil {
				return nil, err
			}
		case literal:
			copy(piece, data)
			data = data[min(len(data), (int(n)+d.unit-1)/d.unit*d.unit):]
		}
		d.fresh = d.fresh || r.kind != same
		d.at += n
		r.from += n
		left -= n
		if in+int(n) == size {
			if err := d.complete(in + int(n)); err != nil {
				return nil, err
			}
		}
	}
	return data, nil
}

// readNew reads what was put together already, wherever it is by now.
func (d *decoder) readNew(p []byte, off int64) error {
	begin := d.at / segmentSize * segmentSize
	if d.buf == nil {
		begin = d.at
	}
	if n := min(int64(len(p)), begin-off); n > 0 {
		if got, err := d.out.ReadAt(p[:n], off); int64(got) < n {
			return fmt.Errorf("reading again what was written: %w", err)
		}
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		copy(p, d.buf[off-begin:])
	}
	return nil
}

// complete writes the segment that is being put together, and has it hashed.
func (d *decoder) complete(size int) error {
	buf, i := d.buf, int((d.at-1)/segmentSize)
	d.buf = nil
	if err := d.writeOut(buf[:size], int64(i)*segmentSize); err != nil {
		putSegment(buf)
		return err
	}
	if _, n := segment(d.header.base, i); !d.fresh && n == size {
		putSegment(buf)
		return d.hashing.submit(func() (Digest, error) { return d.baseTree.segments[i], nil })
	}
	return d.hashing.submit(func() (Digest, error) {
		defer putSegment(buf)
		return hashSegment(buf[:size]), nil
	})
}

// writeOut writes a segment, without its zero pages if the output is sparse.
func (d *decoder) writeOut(p []byte, off int64) error {
	for len(p) > 0 {
		n := len(p)
		if d.sparse {
			skip := 0
			for skip < len(p) && isZero(p[skip:min(skip+pageSize, len(p))]) {
				skip += pageSize
			}
			if skip >= len(p) {
				return nil
			}
			p, off = p[skip:], off+int64(skip)
			n = 0
			for n < len(p) && !isZero(p[n:min(n+pageSize, len(p))]) {
				n = min(n+pageSize, len(p))
			}
		}
		if _, err := d.out.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// end compares the footer with what it must be after all that was decoded.
func (d *decoder) end() error {
	want := d.footer.append(nil, d.sealer)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(d.in, got); err != nil {
		if errors.Is(cut(err), ErrTruncated) && !bytes.HasPrefix(want, got[:n]) {
			return fmt.Errorf("%w: the image is not what the footer says", ErrCorrupt)
		}
		return cut(err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: the image is not what the footer says", ErrCorrupt)
	}
	return nil
}
