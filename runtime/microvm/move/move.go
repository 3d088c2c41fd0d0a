// Package move carries a running machine from one QEMU to another.
//
// Both have the same base, a snapshot's or template's memory, so what travels is
// little: the sender takes QEMU's migration stream apart, drops every page that the
// receiver has already, sends the others as differences, compressed, and the
// receiver makes of that the stream that the other QEMU expects. The machine runs on
// meanwhile; QEMU stops it for the last changes only. The uppermost layer of its
// disk goes along in the same stream, what has changed of it again and again.
package move

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"
)

// Base is memory that both sides have.
type Base struct {
	Memory []byte            // a whole number of pages, not changed while it is used; nil: zeros
	Over   map[uint32][]byte // pages that are other ones than in Memory, by number; may be nil
	Image  io.ReaderAt       // what the machine's files are in, which nobody changes; nil: none
	Digest string            // names all of it; the receiver refuses a sender that has another one
}

// Stats is what a move took.
type Stats struct {
	Pages   int   // that QEMU sent, each as often as it did
	Equal   int   // of these: not sent, since the receiver has them
	Zero    int   // sent as a word
	Found   int   // sent as a place in the image
	Changed int   // sent as a difference
	Blocks  int   // of the disk that were sent
	Read    int64 // bytes of QEMU's stream
	Wire    int64 // bytes between sender and receiver
}

// The wire is one zstd stream: a greeting, then records.
//
//	greeting   magic, length of the digest (1), digest
//	'R'        length (4), bytes of QEMU's stream
//	'B'        pages (4), length of the name (1), name: the block that pages are of
//	'P'        page (4), its difference to the reference
//	'Z'        page (4): it is zero
//	'F'        page (4): it is the image's, page (4)
//	'D'        block (4) of the disk's layer, length (4), its bytes
//	'E'        checksum (8) of what was sent, before it was made small: the end
//
// The reference of a page is what was sent of it before, if that is still kept,
// and else the base.
const (
	wireMagic  = "atoll-move-3\n"
	recRaw     = 'R'
	recBlock   = 'B'
	recPage    = 'P'
	recZero    = 'Z'
	recFound   = 'F'
	recDisk    = 'D'
	recEnd     = 'E'
	maxRaw     = chunk + 1<<10
	maxPages   = 1 << 30 // of the block: 4 TiB
	wireWindow = 1 << 20
)

// keptPages bounds the pages that each side remembers, 256 MiB. Beyond that
// differences are to the base alone.
const keptPages = 64 << 10

// references tells each side the same about what the other has of a page.
type references struct {
	base Base
	sent map[uint32]*[pageSize]byte // nil: something that is not kept
}

func newReferences(base Base) references {
	return references{base, map[uint32]*[pageSize]byte{}}
}

var zeroPage [pageSize]byte

// of returns the reference of a page, and whether the receiver has exactly that.
func (r *references) of(page uint32) (ref []byte, exact bool) {
	kept, sent := r.sent[page]
	if kept != nil {
		return kept[:], true
	}
	ref = zeroPage[:]
	if over := r.base.Over[page]; over != nil {
		ref = over
	} else if at := int64(page) * pageSize; at+pageSize <= int64(len(r.base.Memory)) {
		ref = r.base.Memory[at : at+pageSize]
	}
	return ref, !sent
}

// sending notes that a page is sent.
func (r *references) sending(page uint32, data []byte) {
	kept := r.sent[page]
	if kept == nil && len(r.sent) < keptPages {
		kept = new([pageSize]byte)
	}
	if kept != nil {
		copy(kept[:], data)
	}
	r.sent[page] = kept
}

// xor sets dst to the difference of two pages; applied again it undoes itself.
func xor(dst, a, b []byte) {
	for i := 0; i < pageSize; i += 8 {
		binary.NativeEndian.PutUint64(dst[i:], binary.NativeEndian.Uint64(a[i:])^binary.NativeEndian.Uint64(b[i:]))
	}
}

// counter counts what passes.
type counter struct {
	w io.Writer
	r io.Reader
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// sender turns QEMU's stream into records.
type sender struct {
	refs  references
	out   *bufio.Writer
	block string // that pages are of; empty until it is known
	sum   *xxh3.Hasher
	disk  *layer // nil: none
	image *image
	stats Stats
	diff  [pageSize]byte
	head  [5]byte
}

// Send reads the stream of a QEMU that moves its machine away, and writes what
// the receiver needs to wire, also what is in disk, the uppermost layer, which QEMU
// writes until its stream ends; nil: there is none. It returns at the stream's end;
// an error means that the receiver has no machine.
func Send(wire io.Writer, stream io.Reader, base Base, disk io.ReaderAt) (Stats, error) {
	if len(base.Memory)%pageSize != 0 || len(base.Digest) > 255 {
		return Stats{}, fmt.Errorf("a base of %d bytes named %q", len(base.Memory), base.Digest)
	}
	img, err := newImage(base.Image)
	if err != nil {
		return Stats{}, err
	}
	to, from := &counter{w: wire}, &counter{r: stream}
	z, err := zstd.NewWriter(to, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(wireWindow))
	if err != nil {
		return Stats{}, err
	}
	s := &sender{
		refs: newReferences(base),
		out:  bufio.NewWriterSize(z, 64<<10), sum: xxh3.New(), image: img,
	}
	if disk != nil {
		s.disk = newLayer(disk)
	}
	_, _ = s.out.WriteString(wireMagic)
	_ = s.out.WriteByte(byte(len(base.Digest)))
	_, _ = s.out.WriteString(base.Digest)
	err = s.run(newParser(from), z)
	s.stats.Read, s.stats.Wire = from.n, to.n
	return s.stats, err
}

// diskPause is how long the disk is left alone, while the machine runs, after what
// had changed of it was sent.
const diskPause = 300 * time.Millisecond

// run sends everything. Errors of s.out stay in it until it is flushed.
func (s *sender) run(p *parser, z *zstd.Encoder) error {
	var looked time.Time // at the disk
	for {
		it, err := p.next()
		switch {
		case errors.Is(err, io.EOF):
			if err := s.blocks(); err != nil {
				return err
			}
			_ = s.out.WriteByte(recEnd)
			_, _ = s.out.Write(binary.BigEndian.AppendUint64(nil, s.sum.Sum64()))
			return errors.Join(s.out.Flush(), z.Close())
		case err != nil:
			return err
		case it.raw != nil:
			s.raw(it.raw)
		default:
			s.page(it, p.blocks)
		}
		if it.pause {
			if time.Since(looked) >= diskPause {
				if err := s.blocks(); err != nil {
					return err
				}
				looked = time.Now()
			}
			if err := errors.Join(s.out.Flush(), z.Flush()); err != nil {
				return err
			}
		}
	}
}

func (s *sender) record(kind byte, n uint32) {
	s.head[0] = kind
	binary.BigEndian.PutUint32(s.head[1:], n)
	_, _ = s.out.Write(s.head[:])
}

func (s *sender) raw(data []byte) {
	for len(data) > 0 {
		part := data[:min(len(data), maxRaw)]
		s.record(recRaw, uint32(len(part)))
		_, _ = s.out.Write(part)
		_, _ = s.sum.Write(part)
		data = data[len(part):]
	}
}

// page sends a page, if it has to be sent.
func (s *sender) page(it item, blocks map[string]uint64) {
	if s.block == "" {
		s.block = largest(blocks)
		s.record(recBlock, uint32(min(blocks[s.block]/pageSize, maxPages)))
		_ = s.out.WriteByte(byte(len(s.block)))
		_, _ = s.out.WriteString(s.block)
	}
	if it.block != s.block || it.addr/pageSize >= maxPages {
		s.raw(append(pageHeader(it.block, it.addr, flagPage), it.page...)) // firmware and the like
		return
	}
	s.stats.Pages++
	n := uint32(it.addr / pageSize)
	ref, exact := s.refs.of(n)
	if exact && bytes.Equal(ref, it.page) {
		s.stats.Equal++
		return
	}
	if bytes.Equal(it.page, zeroPage[:]) {
		s.stats.Zero++
		s.record(recZero, n)
	} else if at, ok := s.image.find(it.page); ok {
		s.stats.Found++
		s.record(recFound, n)
		_, _ = s.out.Write(binary.BigEndian.AppendUint32(s.diff[:0], at))
	} else {
		s.stats.Changed++
		s.record(recPage, n)
		xor(s.diff[:], it.page, ref)
		_, _ = s.out.Write(s.diff[:])
	}
	_, _ = s.sum.Write(it.page)
	s.refs.sending(n, it.page)
}

// largest returns the block that is the machine's memory.
func largest(blocks map[string]uint64) string {
	var best string
	for name, size := range blocks {
		if size > blocks[best] || size == blocks[best] && name < best {
			best = name
		}
	}
	return best
}

// pageHeader is what stands before a page in QEMU's stream.
func pageHeader(block string, addr uint64, flag uint64) []byte {
	b := binary.BigEndian.AppendUint64(nil, addr|flag)
	return append(append(b, byte(len(block))), block...)
}

// ErrBase says that sender and receiver do not stand at the same template.
var ErrBase = errors.New("the sender has another template")

// receiver turns records into QEMU's stream.
type receiver struct {
	refs  references
	in    *bufio.Reader
	out   *bufio.Writer
	block string
	pages uint32
	sum   *xxh3.Hasher
	disk  io.WriterAt // nil: none
	stats Stats
	page  [pageSize]byte
	raw   []byte
}

func newReceiver(out io.Writer, in io.Reader, base Base, disk io.WriterAt) *receiver {
	return &receiver{
		refs: newReferences(base), disk: disk,
		in: bufio.NewReaderSize(in, 64<<10), out: bufio.NewWriterSize(out, 64<<10),
		sum: xxh3.New(), raw: make([]byte, max(maxRaw, blockSize)),
	}
}

// Receive reads from wire what Send wrote and writes the stream for a QEMU that
// waits for a machine, whose memory must be the base, and what was in the layer of
// the disk to disk, which QEMU must not read before; nil: there is none. The
// machine must not run before Receive has returned without an error.
func Receive(stream io.Writer, wire io.Reader, base Base, disk io.WriterAt) (Stats, error) {
	to, from := &counter{w: stream}, &counter{r: wire}
	z, err := zstd.NewReader(from, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(wireWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return Stats{}, err
	}
	defer z.Close()
	r := newReceiver(to, z, base, disk)
	err = r.greet(base.Digest)
	for done := false; err == nil && !done; {
		if r.in.Buffered() == 0 {
			if err = r.out.Flush(); err != nil {
				break
			}
		}
		done, err = r.record()
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = r.out.Flush()
	}
	r.stats.Read, r.stats.Wire = to.n, from.n
	return r.stats, err
}

func (r *receiver) greet(digest string) error {
	head := make([]byte, len(wireMagic)+1)
	if _, err := io.ReadFull(r.in, head); err != nil {
		return err
	}
	if string(head[:len(wireMagic)]) != wireMagic {
		return errors.New("the sender speaks another language")
	}
	theirs := make([]byte, head[len(wireMagic)])
	if _, err := io.ReadFull(r.in, theirs); err != nil {
		return err
	}
	if string(theirs) != digest {
		return ErrBase
	}
	return nil
}

// record acts on one record and reports whether it was the last.
func (r *receiver) record() (done bool, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r.in, head[:1]); err != nil {
		return false, err
	}
	if head[0] == recEnd {
		sum := make([]byte, 8)
		if _, err := io.ReadFull(r.in, sum); err != nil {
			return false, err
		}
		if binary.BigEndian.Uint64(sum) != r.sum.Sum64() {
			return false, errors.New("what arrived is not what was sent")
		}
		return true, nil
	}
	if _, err := io.ReadFull(r.in, head[1:]); err != nil {
		return false, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	switch {
	case head[0] == recRaw && n <= maxRaw:
		if _, err := io.ReadFull(r.in, r.raw[:n]); err != nil {
			return false, err
		}
		_, _ = r.sum.Write(r.raw[:n])
		_, err = r.out.Write(r.raw[:n])
	case head[0] == recBlock && n <= maxPages && r.block == "":
		r.pages = n
		r.block, err = readName(r.in)
	case (head[0] == recZero || head[0] == recFound || head[0] == recPage) && n < r.pages:
		err = r.putPage(n, head[0])
	case head[0] == recDisk && n < maxDiskBlocks && r.disk != nil:
		err = r.putBlock(n)
	default:
		err = fmt.Errorf("record %q of %d is not understood", head[0], n)
	}
	return false, err
}

func readName(in *bufio.Reader) (string, error) {
	n, err := in.ReadByte()
	if err != nil {
		return "", err
	}
	name := make([]byte, n)
	_, err = io.ReadFull(in, name)
	if err == nil && n == 0 {
		err = errors.New("a block without a name")
	}
	return string(name), err
}

// putPage writes a page of the machine's memory.
func (r *receiver) putPage(n uint32, kind byte) error {
	addr := uint64(n) * pageSize
	r.stats.Pages++
	if kind == recZero {
		r.stats.Zero++
		clear(r.page[:])
		_, _ = r.out.Write(append(pageHeader(r.block, addr, flagZero), 0))
	} else {
		if err := r.content(n, kind); err != nil {
			return err
		}
		_, _ = r.out.Write(pageHeader(r.block, addr, flagPage))
		_, _ = r.out.Write(r.page[:]) // a failed write stays in r.out
	}
	_, _ = r.sum.Write(r.page[:])
	r.refs.sending(n, r.page[:])
	return nil
}

// content reads what a page is into r.page.
func (r *receiver) content(n uint32, kind byte) error {
	if kind == recFound {
		r.stats.Found++
		return r.fromImage()
	}
	r.stats.Changed++
	if _, err := io.ReadFull(r.in, r.page[:]); err != nil {
		return err
	}
	ref, _ := r.refs.of(n)
	xor(r.page[:], r.page[:], ref)
	return nil
}
