package image

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

func encodeInode(n *inode) []byte {
	le := binary.LittleEndian
	b := make([]byte, inodeSize)
	layout := uint16(layoutPlain)
	if n.disk.inline != nil {
		layout = layoutInline
	}
	le.PutUint16(b[0:], 1|layout<<1) // bit 0: extended
	if len(n.disk.xattrs) > 0 {
		le.PutUint16(b[2:], uint16(1+(len(n.disk.xattrs)-12)/4))
	}
	le.PutUint16(b[4:], n.mode)
	le.PutUint64(b[8:], uint64(n.disk.size))
	le.PutUint32(b[16:], n.disk.block)
	le.PutUint32(b[20:], n.disk.number)
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.mtime))
	le.PutUint32(b[40:], n.nsec)
	le.PutUint32(b[44:], n.disk.links)
	return b
}

// dirent is one name of a directory, "." and ".." included.
type dirent struct {
	name string
	n    *inode
}

// direntBlocks sorts a directory's names and cuts them into blocks. EROFS looks
// names up by bisection, so the order is that of bytes.
func direntBlocks(n *inode) [][]dirent {
	all := make([]dirent, 0, len(n.children)+2)
	all = append(all, dirent{".", n}, dirent{"..", n.disk.parent})
	for name, child := range n.children {
		all = append(all, dirent{name, child})
	}
	slices.SortFunc(all, func(a, b dirent) int { return cmp.Compare(a.name, b.name) })
	var blocks [][]dirent
	for len(all) > 0 {
		count, used := 0, 0
		for count < len(all) && used+direntSize+len(all[count].name) <= blockSize {
			used += direntSize + len(all[count].name)
			count++
		}
		blocks = append(blocks, all[:count])
		all = all[count:]
	}
	return blocks
}

// direntsSize is the length of what encodeDirents will return.
func direntsSize(n *inode) int64 {
	blocks := direntBlocks(n)
	size := int64(len(blocks)-1) * blockSize
	for _, d := range blocks[len(blocks)-1] {
		size += direntSize + int64(len(d.name))
	}
	return size
}

func encodeDirents(n *inode) []byte {
	le := binary.LittleEndian
	var out bytes.Buffer
	for _, block := range direntBlocks(n) {
		out.Write(zeros[:(blockSize-out.Len()%blockSize)%blockSize])
		nameOff := direntSize * len(block)
		for _, d := range block {
			var b [direntSize]byte
			le.PutUint64(b[0:], d.n.disk.nid)
			le.PutUint16(b[8:], uint16(nameOff))
			b[10] = direntType(d.n.mode)
			out.Write(b[:])
			nameOff += len(d.name)
		}
		for _, d := range block {
			out.WriteString(d.name)
		}
	}
	return out.Bytes()
}

func direntType(mode uint16) byte {
	switch mode & typeMask {
	case typeReg:
		return 1
	case typeDir:
		return 2
	case typeFifo:
		return 5
	case typeSymlink:
		return 7
	}
	return 0
}

// xattrPrefixes are the name spaces of extended attributes that EROFS knows.
// The two ACLs are whole names.
var xattrPrefixes = []struct {
	index  byte
	prefix string
}{
	{1, "user."}, {2, "system.posix_acl_access"}, {3, "system.posix_acl_default"}, {4, "trusted."}, {6, "security."},
}

// xattrIndex returns how EROFS spells the name; ok is false for a name that it
// cannot hold.
func xattrIndex(name string) (index byte, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		rest, found := strings.CutPrefix(name, p.prefix)
		whole := strings.HasPrefix(p.prefix, "system.")
		if found && (rest == "") == whole && len(rest) <= maxName {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// maxXattrs bounds the encoded attributes of one inode, so that inode and
// attributes stay within one block.
const maxXattrs = blockSize - inodeSize

func encodeXattrs(xattrs map[string]string) ([]byte, error) {
	if len(xattrs) == 0 {
		return nil, nil
	}
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	out := make([]byte, 12) // no name filter, no shared attributes
	for _, name := range names {
		value := xattrs[name]
		index, rest, ok := xattrIndex(name)
		if !ok {
			return nil, fmt.Errorf("extended attribute %q cannot be stored", name)
		}
		if len(out)+len(rest)+len(value)+8 > maxXattrs {
			return nil, fmt.Errorf("extended attributes of one file are larger than %d bytes", maxXattrs)
		}
		out = append(out, byte(len(rest)), index)
		out = binary.LittleEndian.AppendUint16(out, uint16(len(value)))
		out = append(append(out, rest...), value...)
		out = append(out, zeros[:(4-len(out)%4)%4]...)
	}
	return out, nil
}
