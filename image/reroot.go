package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
)

// errCorrupt is the error for a root that this package did not write.
var errCorrupt = errors.New("not a root written by this store, or damaged")

// addEROFS puts the tree of a root beneath the layers to come. It reads exactly
// what writeEROFS writes. Contents stay in r, which must remain open.
func (u *unpacker) addEROFS(r io.ReaderAt, size int64) error {
	u.tree.nextLayer()
	e := &erofsReader{u: u, r: r, size: size, seen: map[uint64]*inode{}}
	var block [blockSize]byte
	if _, err := r.ReadAt(block[:], 0); err != nil {
		return errCorrupt
	}
	super := block[superOffset:]
	le := binary.LittleEndian
	if le.Uint32(super) != erofsMagic || super[12] != 12 || le.Uint32(super[80:]) != 0 {
		return errCorrupt
	}
	e.meta = int64(le.Uint32(super[40:])) * blockSize
	return e.add("", uint64(le.Uint16(super[14:])))
}

type erofsReader struct {
	u    *unpacker
	r    io.ReaderAt
	size int64 // bytes of the image
	meta int64 // where inodes begin, in bytes
	seen map[uint64]*inode
}

// add puts the inode nid at name, and everything below it.
func (e *erofsReader) add(name string, nid uint64) error {
	if e.u.entries++; e.u.entries > e.u.limits.Entries {
		return fmt.Errorf("more than %d files", e.u.limits.Entries)
	}
	if n := e.seen[nid]; n != nil {
		if n.isDir() {
			return errCorrupt // a directory has one path
		}
		return e.u.tree.put(name, n)
	}
	n, contents, err := e.inode(nid)
	if err != nil {
		return fmt.Errorf("path %q: %w", name, err)
	}
	e.seen[nid] = n
	if err := e.u.tree.put(name, n); err != nil || !n.isDir() {
		return err
	}
	for start := int64(0); start < contents.Size(); start += blockSize {
		block := make([]byte, min(blockSize, contents.Size()-start))
		if _, err := contents.ReadAt(block, start); err != nil {
			return errCorrupt
		}
		if err := e.addNames(name, block); err != nil {
			return err
		}
	}
	return nil
}

// addNames adds the entries of one block of a directory.
func (e *erofsReader) addNames(dir string, block []byte) error {
	le := binary.LittleEndian
	if len(block) < direntSize {
		return errCorrupt
	}
	first := int(le.Uint16(block[8:]))
	if first < direntSize || first%direntSize != 0 || first > len(block) {
		return errCorrupt
	}
	for at := 0; at < first; at += direntSize {
		start, end := int(le.Uint16(block[at+8:])), len(block)
		if at+direntSize < first {
			end = int(le.Uint16(block[at+direntSize+8:]))
		}
		if start > end || end > len(block) {
			return errCorrupt
		}
		name, _, _ := bytes.Cut(block[start:end], []byte{0})
		switch string(name) {
		case ".", "..":
			continue
		case "":
			return errCorrupt
		}
		if bytes.IndexByte(name, '/') >= 0 {
			return errCorrupt
		}
		if err := e.add(path.Join(dir, string(name)), le.Uint64(block[at:])); err != nil {
			return err
		}
	}
	return nil
}

// inode reads an inode; contents is what it holds, also for directories.
func (e *erofsReader) inode(nid uint64) (n *inode, contents *io.SectionReader, err error) {
	le := binary.LittleEndian
	var b [inodeSize]byte
	at := e.meta + int64(nid&(1<<48-1))*slotSize
	if _, err := e.r.ReadAt(b[:], at); err != nil || b[0]&1 == 0 {
		return nil, nil, errCorrupt
	}
	n = &inode{
		mode:  le.Uint16(b[4:]),
		uid:   le.Uint32(b[24:]),
		gid:   le.Uint32(b[28:]),
		mtime: int64(le.Uint64(b[32:])),
		nsec:  le.Uint32(b[40:]),
	}
	at += inodeSize
	if count := int64(le.Uint16(b[2:])); count > 0 {
		raw := make([]byte, 12+4*(count-1))
		if _, err := e.r.ReadAt(raw, at); err != nil {
			return nil, nil, errCorrupt
		}
		if n.xattrs, err = decodeXattrs(raw); err != nil {
			return nil, nil, err
		}
		at += int64(len(raw))
	}
	size := int64(le.Uint64(b[8:]))
	switch le.Uint16(b[0:]) >> 1 {
	case layoutPlain:
		at = int64(le.Uint32(b[16:])) * blockSize
	case layoutInline:
	default:
		return nil, nil, errCorrupt
	}
	if size < 0 || at > e.size || size > e.size-at {
		return nil, nil, errCorrupt
	}
	contents = io.NewSectionReader(e.r, at, size)
	return n, contents, e.fill(n, contents)
}

// fill gives an inode what its type wants.
func (e *erofsReader) fill(n *inode, contents *io.SectionReader) error {
	switch n.mode & typeMask {
	case typeReg:
		if contents.Size() > 0 {
			n.data = contents
		}
	case typeDir:
		n.children = map[string]*inode{}
	case typeSymlink:
		if contents.Size() > maxTarget {
			return errCorrupt
		}
		target, err := io.ReadAll(contents)
		if err != nil {
			return err
		}
		n.target = string(target)
	case typeFifo:
	default:
		return errCorrupt
	}
	return nil
}

// decodeXattrs undoes encodeXattrs.
func decodeXattrs(b []byte) (map[string]string, error) {
	xattrs := map[string]string{}
	for b = b[12:]; len(b) >= 4; {
		nameLen, index := int(b[0]), b[1]
		valueLen := int(binary.LittleEndian.Uint16(b[2:]))
		end := 4 + nameLen + valueLen
		if end > len(b) {
			return nil, errCorrupt
		}
		prefix := ""
		for _, p := range xattrPrefixes {
			if p.index == index {
				prefix = p.prefix
			}
		}
		if prefix == "" {
			return nil, errCorrupt
		}
		xattrs[prefix+string(b[4:4+nameLen])] = string(b[4+nameLen : end])
		b = b[min(len(b), (end+3)/4*4):]
	}
	return xattrs, nil
}
