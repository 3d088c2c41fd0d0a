package transfer

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/atoll-run/atoll/chunk/pack"
)

// A Method is what the encoder looks for. The zero value is Delta.
type Method int

// The methods, by rising size of what they make and falling processor time.
const (
	Delta Method = iota // equal and similar pages anywhere
	Dedup               // equal pages anywhere
	Whole               // nothing of the base
)

// String returns the method's name, as ParseMethod takes it.
func (m Method) String() string {
	switch m {
	case Delta:
		return "delta"
	case Dedup:
		return "dedup"
	case Whole:
		return "whole"
	}
	return fmt.Sprintf("Method(%d)", int(m))
}

// ParseMethod returns the method with a name.
func ParseMethod(name string) (Method, error) {
	for m := Delta; m <= Whole; m++ {
		if m.String() == name {
			return m, nil
		}
	}
	return 0, fmt.Errorf("%w: there is no method %q; there are delta, dedup and whole", ErrOption, name)
}

// Options of Encode. The zero value is good.
type Options struct {
	Method Method
	// Index of the base, when it is kept beside it; nil builds one.
	Index *Index
	// Random makes a delta that a Reader can read anywhere without decoding what is before: nothing refers to the new image
	// itself. It costs some bytes.
	Random bool
	// Frame is how many bytes of literals a frame holds, from 4 KB to 16 MiB; 0 means DefaultFrame. Smaller frames are read
	// at random sooner, and compress worse.
	Frame int
	// Link and CPU decide what frames are packed with, and how long it may take. They are part of what the delta is a function
	// of: who wants the same delta again gives the same. The zero values are pack.DefaultLink and a core of its table.
	Link pack.Link
	CPU  pack.CPU
}

// Stats say what Encode made, in bytes of the new image unless said otherwise.
type Stats struct {
	Method                     Method
	Same, Zero, Moved, Earlier int64 // found in the base at the same offset, zero, found elsewhere in the base, in the new image
	Patched                    int64 // found in the base but for a few bytes
	Literal                    int64
	Dictionary                 int64 // bytes of all dictionaries
	Groups                     int
	Maps, Frames, Written      int64 // bytes of the delta: maps, frames, and all
	Base, New                  Digest
}

func (o *Options) frame() (int, error) {
	switch {
	case o.Frame == 0:
		return DefaultFrame, nil
	case o.Frame < pageSize || o.Frame > maxFrame:
		return 0, fmt.Errorf("%w: a frame of %d bytes; it must be from %d to %d", ErrOption, o.Frame, pageSize, maxFrame)
	}
	return o.Frame / pageSize * pageSize, nil
}

// Encode writes to w a delta that turns base into next. A base whose At is nil is not held: everything is sent. What is
// written is a function of the images and the options. When it fails, what was written is of no use.
func Encode(ctx context.Context, w io.Writer, base, next Image, o Options) (Stats, error) {
	if base.At == nil {
		base, o.Method = Image{}, Whole
	}
	if o.Method == Whole {
		base, o.Index = Image{}, nil
	}
	frame, err := o.frame()
	if err != nil {
		return Stats{}, err
	}
	if err := base.check(); err != nil {
		return Stats{}, err
	}
	if err := next.check(); err != nil {
		return Stats{}, err
	}
	switch {
	case o.Index != nil && o.Index.tree.size != base.Size:
		return Stats{}, fmt.Errorf("%w: it is of an image of %d bytes, not %d", ErrIndex, o.Index.tree.size, base.Size)
	case o.Index == nil && o.Method != Whole:
		if o.Index, err = buildIndex(ctx, base, o.Method == Delta); err != nil {
			return Stats{}, err
		}
	}
	h := header{layout: layout{unit: pageSize, frame: frame, next: next.Size, base: base.Size, baseOnly: o.Random}}
	if base.Size > 0 {
		h.baseDigest = o.Index.Digest()
	}
	s := &scanner{next: next, base: base, index: o.Index, similar: o.Method == Delta}
	return encode(ctx, w, h, base, next, o, s.segment)
}

// encode writes a delta of what scan finds out about each segment of the new image.
func encode(ctx context.Context, w io.Writer, h header, base, next Image, o Options, scan func(i int) (scanned, error)) (Stats, error) {
	e := &encoder{w: w, layout: h.layout, options: o, base: base, next: next, tree: &Tree{size: next.Size}}
	e.stats = Stats{Method: o.Method, Base: h.baseDigest}
	if err := e.begin(h); err != nil {
		return e.stats, err
	}
	if err := e.scan(ctx, scan); err != nil {
		return e.stats, err
	}
	return e.stats, e.end()
}

// An encoder writes one delta. Groups are cut in the order of the image on one goroutine, compressed on many, and written
// in order on one.
type encoder struct {
	layout
	w          io.Writer
	options    Options
	base, next Image
	tree       *Tree // of the new image, as far as it was scanned
	sealer     sealer
	footer     footer
	stats      Stats
	buffers    sync.Pool // of *[]byte: literals and dictionaries of groups that are packed
}

// buffer returns an empty buffer with room for n bytes; it goes back to the pool when the group is packed.
func (e *encoder) buffer(n int) *[]byte {
	b, _ := e.buffers.Get().(*[]byte)
	if b == nil {
		b = new([]byte)
	}
	*b = slices.Grow((*b)[:0], n)
	return b
}

func (e *encoder) write(b []byte) error {
	n, err := e.w.Write(b)
	e.stats.Written += int64(n)
	return err
}

func (e *encoder) begin(h header) error {
	raw := h.append(nil)
	e.sealer = newSealer(raw)
	return e.write(raw)
}

func (e *encoder) end() error {
	e.footer.next = e.tree.Root()
	e.stats.New = e.footer.next
	return e.write(e.footer.append(nil, e.sealer))
}

// scan finds out about all segments and has groups packed.
func (e *encoder) scan(ctx context.Context, scan func(i int) (scanned, error)) error {
	packing := newPipeline(ctx, e.take)
	g := newGrouper(e, func(c *cutGroup) error {
		return packing.submit(func() (*record, error) { return e.pack(c) })
	})
	scanning := newPipeline(packing.ctx, func(s scanned) error {
		defer putSegment(s.data)
		e.tree.segments = append(e.tree.segments, s.digest)
		return g.add(&s)
	})
	for i := range segments(e.next.Size) {
		if err := scanning.submit(func() (scanned, error) { return scan(i) }); err != nil {
			break // close says why
		}
	}
	err := scanning.close()
	if err == nil {
		err = g.flush()
	}
	if err != nil {
		packing.abort(err)
		return err
	}
	return packing.close()
}

// pack makes a group's record.
func (e *encoder) pack(c *cutGroup) (*record, error) {
	r := &record{units: c.units, literals: c.literals}
	if c.literals > 0 {
		defer e.buffers.Put(c.data)
		if err := e.packLiterals(c, r); err != nil {
			return nil, err
		}
	}
	raw := c.appendMap(nil, e.unit)
	r.mapSize = len(raw)
	var err error
	if r.packedMap, err = pack.AppendFrame(nil, raw, pack.With{}, pack.Plan{Coder: pack.Zstd, Level: zstd.SpeedBestCompression}); err != nil {
		return nil, err
	}
	r.digest = r.hash(raw, c.literalBytes())
	return r, nil
}

// packLiterals makes the frame of a group; a dictionary that it does not need it takes from the group.
func (e *encoder) packLiterals(c *cutGroup, r *record) (err error) {
	data, with := c.literalBytes(), pack.With{}
	sample := pack.Look(data)
	plan := pack.Choose(sample, e.options.Link, e.options.CPU)
	switch pages := pageCount(c.fromNew) + pageCount(c.fromBase); {
	case sample.Planes() && e.base.Size > 0:
		if with.Prior, err = c.prior(e.layout, e.base); err != nil {
			return err
		}
		plan.Against = pack.Nearer(sample, data, with.Prior)
	case !sample.Planes() && pages*pageSize >= int64(len(data)/leastDictionary):
		buf := e.buffer(int(pages) * pageSize)
		defer e.buffers.Put(buf)
		if *buf, err = c.dictionary(*buf, e.next.read, e.base.read); err != nil {
			return err
		}
		// A search with fewer tables finds nothing in that much, whatever the link.
		with.Dictionary, plan = *buf, pack.Plan{Coder: pack.Zstd, Level: zstd.SpeedBetterCompression}
	case e.options.Method == Dedup && plan.Level > zstd.SpeedDefault:
		plan.Level = zstd.SpeedDefault // the method is for links that are not worth more
	}
	if r.dictionary = len(with.Dictionary); r.dictionary == 0 {
		c.fromNew, c.fromBase = nil, nil
	}
	if plan.Coder != pack.Stored && plan.Planes == 0 && plan.Level < usual.Level && e.options.Link.Bandwidth < usualKeepsUp {
		plan = usual // a sample sees no repetition farther than its windows, and here a better search costs no time
	}
	r.frame, err = packFrame(data, with, sample, plan)
	return err
}

// packFrame packs by a plan. A frame holds pages of many files, so that a sample may mislead: where it says that there is nothing to
// gain, or that all are numbers, the usual way is tried on the whole.
func packFrame(data []byte, with pack.With, s pack.Sample, p pack.Plan) ([]byte, error) {
	if s.Class == pack.Packed && p.Coder == pack.Stored {
		p = usual
	}
	frame, err := pack.AppendFrame(make([]byte, 0, len(data)/4+64), data, with, p)
	if err != nil || p.Planes == 0 || p.Against {
		return frame, err
	}
	plain, err := pack.AppendFrame(nil, data, pack.With{}, usual)
	if len(plain) < len(frame) {
		return plain, err
	}
	return frame, err
}

// usual packs what nothing better is known of. On bytes that cannot be packed it is fast.
var usual = pack.Plan{Coder: pack.Zstd, Level: zstd.SpeedDefault}

// usualKeepsUp is up to which bandwidth, in bytes per second, one core packs by it no slower than what a quarter of the bytes takes
// to be sent.
const usualKeepsUp = 50e6

// leastDictionary is which part of the literals a dictionary must be, at least, to be worth its search: a sixteenth saves 3 %
// of a frame, less next to nothing.
const leastDictionary = 64

// dictionary appends the pages that a group's frame is compressed with.
func (g *group) dictionary(d []byte, next, base func(p []byte, off int64) error) ([]byte, error) {
	for i, spans := range [2][]span{g.fromNew, g.fromBase} {
		read := [2]func([]byte, int64) error{next, base}[i]
		for _, s := range spans {
			n := len(d)
			d = slices.Grow(d, int(s.pages*pageSize))[:n+int(s.pages*pageSize)]
			if err := read(d[n:], s.first*pageSize); err != nil {
				return nil, err
			}
		}
	}
	return d, nil
}

// prior returns what the base has where the group's literals are in the new image.
func (g *group) prior(l layout, base Image) ([]byte, error) {
	p := make([]byte, 0, g.literals*int64(l.unit)) // at most a frame
	at := g.first * int64(l.unit)
	for _, r := range g.runs {
		size := r.units * int64(l.unit)
		if r.kind == literal {
			n := len(p)
			p = p[:n+int(size)]
			if err := base.read(p[n:], at); err != nil {
				return nil, err
			}
		}
		at += size
	}
	return p, nil
}

// take writes a group's record.
func (e *encoder) take(r *record) error {
	raw := r.append(nil)
	e.sealer.add(r.digest[:])
	e.footer.entries = append(e.footer.entries, entry{int64(len(raw)), r.units})
	e.stats.Groups++
	e.stats.Maps += int64(len(r.packedMap))
	e.stats.Frames += int64(len(r.frame))
	e.stats.Dictionary += int64(r.dictionary)
	return e.write(raw)
}
