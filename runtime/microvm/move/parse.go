package move

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// What QEMU sends is its magic, then sections: the memory's, again and again with
// what changed meanwhile, and at the end those of the devices. All numbers are
// big-endian. Machines run with migration.send-configuration=off, so nothing
// stands before the sections.
const (
	streamMagic   = "QEVM"
	streamVersion = 3

	sectionStart   = 1 // id, name, instance, version, content, footer
	sectionPart    = 2 // id, content, footer
	sectionEnd     = 3 // likewise, the last
	sectionCommand = 8 // number and length of two bytes each, content
	footerSize     = 5

	ramName = "ram"
)

// Pages in a section of the memory have a header of eight bytes: the address
// in its block with these flags in the low bits.
const (
	flagZero     = 0x02 // one byte follows, which the page is full of
	flagMemSize  = 0x04 // no page but a list of blocks; the address is their total size
	flagPage     = 0x08 // the page follows
	flagEnd      = 0x10 // no page; the section ends
	flagContinue = 0x20 // the page is of the same block as the one before; else its name comes first
	flagsKnown   = flagZero | flagMemSize | flagPage | flagEnd | flagContinue
)

const (
	pageSize  = 4096
	maxBlocks = 256
	chunk     = 32 << 10 // bytes of devices' state passed on at a time
)

var errStream = errors.New("QEMU's stream is not understood")

// item is a piece of the stream: bytes to pass on as they are, or a page.
type item struct {
	raw   []byte // nil for a page
	block string
	addr  uint64 // within the block
	page  []byte // pageSize bytes
	pause bool   // QEMU may send nothing more for a while: do not hold this back
}

// parser takes the stream apart. What it returns is valid until the next call.
type parser struct {
	in     *bufio.Reader
	state  func() (item, error)
	ram    uint32 // id of the memory's sections; 0 before the first
	blocks map[string]uint64
	block  string // of the last page
	buf    []byte
	page   [pageSize]byte
}

func newParser(r io.Reader) *parser {
	p := &parser{in: bufio.NewReaderSize(r, 64<<10), blocks: map[string]uint64{}}
	p.state = p.start
	return p
}

// next returns the next piece, or io.EOF where the stream may end: after the
// devices.
func (p *parser) next() (item, error) {
	p.buf = p.buf[:0]
	return p.state()
}

// take reads n bytes, to be passed on with all taken since next was called.
func (p *parser) take(n int) ([]byte, error) {
	from := len(p.buf)
	p.buf = append(p.buf, make([]byte, n)...)
	_, err := io.ReadFull(p.in, p.buf[from:])
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return p.buf[from:], err
}

// takeName reads a name, which its length precedes.
func (p *parser) takeName() (string, error) {
	n, err := p.take(1)
	if err != nil {
		return "", err
	}
	name, err := p.take(int(n[0]))
	return string(name), err
}

func (p *parser) start() (item, error) {
	head, err := p.take(len(streamMagic) + 4)
	if err != nil {
		return item{}, err
	}
	if string(head[:4]) != streamMagic || binary.BigEndian.Uint32(head[4:]) != streamVersion {
		return item{}, fmt.Errorf("%w: it begins with %x", errStream, head)
	}
	p.state = p.section
	return item{raw: p.buf}, nil
}

func (p *parser) section() (item, error) {
	kind, err := p.take(1)
	if err != nil {
		return item{}, err
	}
	switch kind[0] {
	case sectionStart, sectionPart, sectionEnd:
		if err := p.ramHeader(kind[0] == sectionStart); err != nil {
			return item{}, err
		}
		p.state = p.memory
	case sectionCommand:
		head, err := p.take(4)
		if err != nil {
			return item{}, err
		}
		if _, err := p.take(int(binary.BigEndian.Uint16(head[2:]))); err != nil {
			return item{}, err
		}
	default: // devices, to the end
		p.state = p.rest
	}
	return item{raw: p.buf}, nil
}

// ramHeader reads the header of a section, which must be the memory's.
func (p *parser) ramHeader(first bool) error {
	field, err := p.take(4)
	if err != nil {
		return err
	}
	id := binary.BigEndian.Uint32(field)
	if first {
		name, err := p.takeName()
		if err != nil {
			return err
		}
		if name != ramName || p.ram != 0 || id == 0 {
			return fmt.Errorf("%w: section %d is of %q", errStream, id, name)
		}
		if _, err := p.take(8); err != nil { // instance, version
			return err
		}
		p.ram = id
	}
	if id != p.ram {
		return fmt.Errorf("%w: section %d", errStream, id)
	}
	return nil
}

// memory reads what a section of the memory consists of.
func (p *parser) memory() (item, error) {
	field, err := p.take(8)
	if err != nil {
		return item{}, err
	}
	head := binary.BigEndian.Uint64(field)
	flags, addr := head&(pageSize-1), head&^(pageSize-1)
	switch {
	case flags&^flagsKnown != 0:
		return item{}, fmt.Errorf("%w: flags %#x of a page", errStream, flags)
	case flags&flagMemSize != 0:
		return item{raw: p.buf}, p.blockList(addr)
	case flags&flagEnd != 0:
		if _, err := p.take(footerSize); err != nil {
			return item{}, err
		}
		p.state = p.section
		return item{raw: p.buf, pause: true}, nil
	}
	if flags&flagContinue == 0 {
		if p.block, err = p.takeName(); err != nil {
			return item{}, err
		}
	}
	size, ok := p.blocks[p.block]
	if !ok || addr >= size {
		return item{}, fmt.Errorf("%w: page %#x of %q", errStream, addr, p.block)
	}
	it := item{block: p.block, addr: addr, page: p.page[:]}
	switch {
	case flags&flagZero != 0:
		fill, err := p.take(1)
		if err != nil {
			return item{}, err
		}
		for i := range p.page {
			p.page[i] = fill[0]
		}
	case flags&flagPage != 0:
		if _, err := io.ReadFull(p.in, p.page[:]); err != nil {
			return item{}, io.ErrUnexpectedEOF
		}
	default:
		return item{}, fmt.Errorf("%w: flags %#x of a page", errStream, flags)
	}
	return it, nil
}

// blockList reads the names and sizes of the memory's blocks.
func (p *parser) blockList(total uint64) error {
	for total > 0 {
		name, err := p.takeName()
		if err != nil {
			return err
		}
		field, err := p.take(8)
		if err != nil {
			return err
		}
		size := binary.BigEndian.Uint64(field)
		if size == 0 || size > total || len(p.blocks) == maxBlocks {
			return fmt.Errorf("%w: block %q of %d bytes", errStream, name, size)
		}
		p.blocks[name] = size
		total -= size
	}
	return nil
}

// rest passes on what follows the memory.
func (p *parser) rest() (item, error) {
	p.buf = append(p.buf, make([]byte, chunk)...)
	n, err := p.in.Read(p.buf)
	if n == 0 {
		if err == nil {
			err = io.ErrNoProgress
		}
		return item{}, err
	}
	return item{raw: p.buf[:n], pause: p.in.Buffered() == 0}, nil
}
