package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/zeebo/blake3"
)

// This file writes EROFS images: uncompressed, 4 KiB blocks, extended inodes.
// The order on disk is superblock, contents of files, large directories,
// inodes. It is our own because sandboxes need three things of it that the
// available writer lacks: hard links that share one inode, regular files never
// stored inside inodes (gVisor cannot map those into memory), and equal
// contents stored once. The result depends on nothing but the tree.
//
// The format: https://docs.kernel.org/filesystems/erofs.html

const (
	blockSize   = 4096
	slotSize    = 32 // unit of inode numbers
	inodeSize   = 64
	direntSize  = 12
	superOffset = 1024
	erofsMagic  = 0xE0F5E1E2

	layoutPlain  = 0 // contents in blocks of their own
	layoutInline = 2 // contents right behind the inode, within its block
)

// diskInode is where the writer put an inode.
type diskInode struct {
	placed bool
	number uint32 // 1, 2, 3... in the order of first paths
	nid    uint64 // position in the inode area, in slots
	links  uint32
	block  uint32 // first block of the contents
	size   int64  // bytes of contents, directories included
	inline []byte // contents that follow the inode; nil unless layoutInline
	xattrs []byte // encoded, nil when there are none
	parent *inode // of a directory
}

// writeEROFS writes the tree as an EROFS image to w, which must be empty, and
// returns the number of bytes written.
func writeEROFS(w io.WriteSeeker, t *tree) (int64, error) {
	e := &erofsWriter{out: bufio.NewWriterSize(w, 1<<20), dedupe: map[contentKey]uint32{}}
	if err := e.pad(blockSize); err != nil { // the superblock comes last
		return 0, err
	}
	if err := e.collect(t); err != nil {
		return 0, err
	}
	for _, n := range e.inodes {
		if err := e.writeContents(n); err != nil {
			return 0, err
		}
	}
	if err := e.layout(); err != nil {
		return 0, err
	}
	if err := e.writeDirectories(); err != nil {
		return 0, err
	}
	meta := e.block()
	if err := e.writeInodes(); err != nil {
		return 0, err
	}
	if err := e.out.Flush(); err != nil {
		return 0, err
	}
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	if _, err := w.Write(e.superblock(meta)); err != nil {
		return 0, err
	}
	return e.off, nil
}

type contentKey struct {
	sum  [16]byte
	size int64
}

type erofsWriter struct {
	out    *bufio.Writer
	off    int64    // bytes written so far
	inodes []*inode // in the order of their numbers
	dedupe map[contentKey]uint32
	buf    [64 << 10]byte
}

func (e *erofsWriter) write(p []byte) error {
	n, err := e.out.Write(p)
	e.off += int64(n)
	return err
}

var zeros [blockSize]byte

// pad writes zeros up to the next multiple of unit, which is at most a block;
// at the very start it writes a whole unit.
func (e *erofsWriter) pad(unit int64) error {
	n := (unit - e.off%unit) % unit
	if e.off == 0 {
		n = unit
	}
	return e.write(zeros[:n])
}

func (e *erofsWriter) block() uint32 { return uint32(e.off / blockSize) }

// collect numbers the inodes and counts their links.
func (e *erofsWriter) collect(t *tree) error {
	var visit func(n, parent *inode)
	visit = func(n, parent *inode) {
		if n.disk.placed {
			n.disk.links++
			return
		}
		e.inodes = append(e.inodes, n)
		n.disk = diskInode{placed: true, number: uint32(len(e.inodes)), links: 1, parent: parent}
		if n.isDir() {
			n.disk.links = 2
			for _, name := range n.names() {
				child := n.children[name]
				if child.isDir() {
					n.disk.links++
				}
				visit(child, n)
			}
		}
	}
	visit(t.root, t.root)
	for _, n := range e.inodes {
		var err error
		if n.disk.xattrs, err = encodeXattrs(n.xattrs); err != nil {
			return err
		}
	}
	return nil
}

// writeContents writes a regular file's contents, unless the same are already
// there. Hashing first costs a second read from the page cache; writing first
// would need a writer that can go back.
func (e *erofsWriter) writeContents(n *inode) error {
	if n.data == nil || n.data.Size() == 0 {
		return nil
	}
	n.disk.size = n.data.Size()
	hash := blake3.New()
	if err := e.copy(hash, n.data); err != nil {
		return err
	}
	key := contentKey{size: n.disk.size}
	copy(key.sum[:], hash.Sum(nil))
	if block, ok := e.dedupe[key]; ok {
		n.disk.block = block
		return nil
	}
	n.disk.block = e.block()
	e.dedupe[key] = n.disk.block
	if e.off+n.disk.size > int64(blockSize)<<32-1<<30 {
		return fmt.Errorf("the image is larger than EROFS can hold")
	}
	if err := e.copy(e.out, n.data); err != nil {
		return err
	}
	e.off += n.disk.size
	return e.pad(blockSize)
}

func (e *erofsWriter) copy(w io.Writer, r *io.SectionReader) error {
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, e.buf[:])
	if err == nil && n != r.Size() {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// layout gives every inode its place, and decides what goes right behind it:
// symbolic links and small directories, as long as they stay in one block.
func (e *erofsWriter) layout() error {
	var at int64 // bytes from the start of the inode area
	for _, n := range e.inodes {
		var inline int64
		if n.isDir() {
			n.disk.size = direntsSize(n)
			inline = n.disk.size
		} else if n.mode&typeMask == typeSymlink {
			n.disk.size = int64(len(n.target))
			inline = n.disk.size
		}
		size := inodeSize + int64(len(n.disk.xattrs))
		if size+inline > blockSize {
			inline = 0
		}
		if size += inline; at%blockSize+size > blockSize {
			at = (at + blockSize - 1) / blockSize * blockSize
		}
		n.disk.nid = uint64(at / slotSize)
		if inline > 0 {
			n.disk.inline = []byte(n.target) // a directory's follows when all nids are known
		}
		at += (size + slotSize - 1) / slotSize * slotSize
		if n.isDir() && inline > 0 {
			n.disk.inline = []byte{}
		}
	}
	return nil
}

// writeDirectories encodes all directories and writes those that, like very
// long links, have blocks of their own.
func (e *erofsWriter) writeDirectories() error {
	for _, n := range e.inodes {
		contents := []byte(n.target)
		if n.isDir() {
			contents = encodeDirents(n)
		}
		if n.disk.inline != nil {
			n.disk.inline = contents
			continue
		}
		if len(contents) == 0 {
			continue
		}
		n.disk.block = e.block()
		if err := e.write(contents); err != nil {
			return err
		}
		if err := e.pad(blockSize); err != nil {
			return err
		}
	}
	return nil
}

func (e *erofsWriter) writeInodes() error {
	start := e.off
	for _, n := range e.inodes {
		for gap := start + int64(n.disk.nid)*slotSize - e.off; gap > 0; {
			part := min(gap, blockSize)
			if err := e.write(zeros[:part]); err != nil {
				return err
			}
			gap -= part
		}
		for _, part := range [][]byte{encodeInode(n), n.disk.xattrs, n.disk.inline} {
			if err := e.write(part); err != nil {
				return err
			}
		}
	}
	return e.pad(blockSize)
}

func (e *erofsWriter) superblock(meta uint32) []byte {
	le := binary.LittleEndian
	block := make([]byte, blockSize)
	b := block[superOffset:]
	le.PutUint32(b[0:], erofsMagic)
	le.PutUint32(b[8:], 1) // compatible feature: checksum of this block
	b[12] = 12             // log2(blockSize)
	// The root's number, 16 bits at 14, is 0: it is the first inode.
	le.PutUint64(b[16:], uint64(len(e.inodes)))
	le.PutUint32(b[36:], e.block()) // blocks in all
	le.PutUint32(b[40:], meta)
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return block
}
