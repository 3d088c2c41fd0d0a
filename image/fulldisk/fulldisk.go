// Package fulldisk reads what a disk image is that a user brings: whole disks with
// a boot loader and a system of their own, raw or in QEMU's format qcow2.
//
// Such an image may have been made to harm whoever opens it. Nothing here follows
// a name that an image holds, and one that holds any is refused.
package fulldisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/atoll-run/atoll/sandbox"
)

// Format is how a disk image is laid out.
type Format string

// The formats that machines can have.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// Image is what there is to know of a disk image.
type Image struct {
	Format Format
	Size   int64 // of the disk, bytes
}

// MaxSize is the size of the largest disk that machines can have, in bytes.
const MaxSize = 4 << 40

// The format: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
const (
	qcowMagic    = "QFI\xfb"
	headerLength = 104 // of version 3
	sectorSize   = 512
)

// headLength is how many of an image's first bytes tell what it is.
const headLength = 2 * sectorSize

// foreignMagics begin images of formats that would be taken for raw disks.
var foreignMagics = map[string]string{
	"KDMV": "VMDK", "vhdxfile": "VHDX", "conectix": "VHD", "QED\x00": "QED", "LUKS\xba\xbe": "LUKS", "<<< ": "VDI", "\x1f\x8b": "gzip", "\xfd7zXZ": "xz", "\x28\xb5\x2f\xfd": "zstd", "PK\x03\x04": "zip",
}

// foreign names the format of an image that cannot be used; empty: it is none.
func foreign(head []byte) string {
	for magic, name := range foreignMagics {
		if bytes.HasPrefix(head, []byte(magic)) {
			return name
		}
	}
	return ""
}

// Recognize reports whether a file is one of a disk rather than a tar archive,
// usable or not. A raw disk is one that a computer's firmware would boot: it begins
// with a boot sector or with a table of partitions.
func Recognize(f io.ReaderAt) bool {
	head := make([]byte, headLength)
	n, _ := f.ReadAt(head, 0) // what cannot be read is not recognized
	head = head[:n]
	if bytes.HasPrefix(head, []byte(qcowMagic)) || foreign(head) != "" {
		return true
	}
	const tarMagic, bootMark = 257, sectorSize - 2
	if len(head) < sectorSize || bytes.HasPrefix(head[tarMagic:], []byte("ustar")) {
		return false
	}
	return bytes.HasPrefix(head[bootMark:], []byte{0x55, 0xaa}) || bytes.HasPrefix(head[sectorSize:], []byte("EFI PART"))
}

// Inspect reads what the disk image at path is. It fails with Invalid for one that
// refers to other files, by which its author could read the host's, and one that is
// encrypted or marked as corrupt.
func Inspect(path string) (Image, error) {
	const op = "fulldisk.Inspect"
	f, err := os.Open(path)
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.NotFound, path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Image{}, sandbox.E(op, "", path, err)
	}
	if !info.Mode().IsRegular() {
		return Image{}, sandbox.Errorf(op, sandbox.Invalid, path, "not a file")
	}
	head := make([]byte, headLength)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Image{}, sandbox.E(op, "", path, err)
	}
	h, err := parse(head[:n], info.Size())
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, path, err)
	}
	return h.Image, nil
}

// Check does what Inspect does for an open image of size bytes, and finds out whether
// a qcow2 image is whole: all that its tables name must lie within the file, as it
// does not when a download was cut short.
func Check(f io.ReaderAt, size int64) (Image, error) {
	const op = "fulldisk.Check"
	head := make([]byte, headLength)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Image{}, sandbox.E(op, "", "", err)
	}
	h, err := parse(head[:n], size)
	if err == nil && h.Format == QCOW2 {
		err = h.checkTables(f, size)
	}
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, "", err)
	}
	return h.Image, nil
}

// header is what the first bytes of an image say. All but the Image is a qcow2's.
type header struct {
	Image
	clusterBits uint32
	tables      int64  // where the table of tables of clusters is, in bytes
	count       uint32 // how many entries that has
	extended    bool   // an entry of a table has 16 bytes instead of 8
}

// parse tells an image from its first bytes and its file's size.
func parse(head []byte, size int64) (header, error) {
	if !bytes.HasPrefix(head, []byte(qcowMagic)) {
		if name := foreign(head); name != "" {
			return header{}, fmt.Errorf("images in the format %s cannot be used: convert it to qcow2 or raw", name)
		}
		if size < sectorSize || size > MaxSize {
			return header{}, fmt.Errorf("a disk of %d bytes; %d to %d are possible", size, sectorSize, int64(MaxSize))
		}
		return header{Image: Image{Raw, size}}, nil
	}
	if len(head) < 72 {
		return header{}, errors.New("the qcow2 image is cut short")
	}
	u32, u64 := binary.BigEndian.Uint32, binary.BigEndian.Uint64
	version, backing, encryption := u32(head[4:]), u64(head[8:]), u32(head[32:])
	disk, tables := u64(head[24:]), u64(head[40:])
	h := header{clusterBits: u32(head[20:]), count: u32(head[36:])}
	var incompatible uint64
	if version >= 3 {
		if len(head) < headerLength {
			return header{}, errors.New("the qcow2 image is cut short")
		}
		incompatible = u64(head[72:])
	}
	const dirty, corrupt, external, compression, extended = 1, 2, 4, 8, 16
	switch {
	case version < 2 || version > 3:
		return header{}, fmt.Errorf("version %d of qcow2", version)
	case backing != 0:
		return header{}, errors.New("the image stands on another one: flatten it with qemu-img convert")
	case encryption != 0:
		return header{}, errors.New("the image is encrypted")
	case incompatible&external != 0:
		return header{}, errors.New("the image keeps its data in another file")
	case incompatible&corrupt != 0:
		return header{}, errors.New("the image is marked as corrupt")
	case incompatible&^(dirty|corrupt|external|compression|extended) != 0:
		return header{}, errors.New("the image has features that are not known")
	case disk < sectorSize || disk > MaxSize:
		return header{}, fmt.Errorf("a disk of %d bytes; %d to %d are possible", disk, sectorSize, int64(MaxSize))
	case h.clusterBits < 9 || h.clusterBits > 21:
		return header{}, fmt.Errorf("clusters of 2^%d bytes", h.clusterBits)
	case tables >= uint64(size):
		return header{}, errors.New("the qcow2 image is cut short: it ends before its table of contents")
	}
	h.Image, h.tables, h.extended = Image{QCOW2, int64(disk)}, int64(tables), incompatible&extended != 0
	return h, nil
}

const (
	maxTable   = 32 << 20 // bytes of the table of tables, as in QEMU
	offsetMask = 1<<56 - 1<<9
	compressed = 1 << 62
)

// checkTables reads all tables of clusters and fails when they name what is not
// in the file. It reads no more than the file has.
func (h header) checkTables(f io.ReaderAt, size int64) error {
	cluster := int64(1) << h.clusterBits
	if int64(h.count)*8 > maxTable || h.tables+int64(h.count)*8 > size {
		return errors.New("the qcow2 image is damaged or cut short: its table of contents does not fit into it")
	}
	entryBits := uint32(3)
	if h.extended {
		entryBits = 4
	}
	if span := int64(1) << (2*h.clusterBits - entryBits); (h.Size+span-1)/span > int64(h.count) {
		return errors.New("the qcow2 image is damaged: its table of contents is too small for its disk")
	}
	top := make([]byte, h.count*8)
	if _, err := f.ReadAt(top, h.tables); err != nil {
		return err
	}
	buf := make([]byte, cluster)
	left := size / cluster // each table has a cluster of its own
	for ; len(top) > 0; top = top[8:] {
		at := int64(binary.BigEndian.Uint64(top) & offsetMask)
		if at == 0 {
			continue
		}
		if left--; left < 0 || at%cluster != 0 || at+cluster > size {
			return errors.New("the qcow2 image is damaged or cut short: a table of its contents lies beyond its end")
		}
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		if at, ok := h.within(buf, 1<<entryBits, size); !ok {
			return fmt.Errorf("the qcow2 image is damaged or cut short: it has %d bytes, and names some at %d", size, at)
		}
	}
	return nil
}

// within reports whether all that a table names begins within the file, or where
// something does not.
func (h header) within(table []byte, entry int, size int64) (at int64, ok bool) {
	for ; len(table) >= entry; table = table[entry:] {
		e := binary.BigEndian.Uint64(table)
		at = int64(e & offsetMask)
		if e&compressed != 0 {
			at = int64(e & (1<<(62-(h.clusterBits-8)) - 1))
		}
		if at >= size {
			return at, false
		}
	}
	return 0, true
}
