package disk

import (
	"encoding/binary"
	"strings"
	"unicode/utf16"
)

// An image of a few files in ISO 9660 (ECMA-119). A second directory, in the
// extension Joliet, has their names as they are.

// isoFile is one file of an image. Its name is ASCII, of at most 30 characters.
type isoFile struct {
	name string
	data []byte
}

const isoSector = 2048

// The sectors of an image.
const (
	isoPrimary = 16 + iota
	isoJoliet
	isoEnd
	isoPrimaryPaths // little-endian, then big-endian
	_
	isoJolietPaths
	_
	isoPrimaryRoot
	isoJolietRoot
	isoFiles
)

// isoImage returns the image. Files must be in the order of their names.
func isoImage(label string, files []isoFile) []byte {
	next := uint32(isoFiles)
	starts := make([]uint32, len(files))
	for i, f := range files {
		starts[i] = next
		next += uint32((len(f.data) + isoSector - 1) / isoSector)
	}
	image := make([]byte, int(next)*isoSector)
	at := func(sector uint32) []byte { return image[int(sector)*isoSector:] }
	isoVolume(at(isoPrimary), 1, isoASCII, label, next, isoPrimaryPaths, isoPrimaryRoot)
	isoVolume(at(isoJoliet), 2, isoUCS2, label, next, isoJolietPaths, isoJolietRoot)
	copy(at(isoJoliet)[88:], "%/E") // UCS-2, level 3
	copy(at(isoEnd), "\xffCD001\x01")
	for _, tree := range []struct {
		paths, root uint32
		name        func(string) string
	}{
		// Linux shows such names in lower case and without the version, even where it lacks Joliet.
		{isoPrimaryPaths, isoPrimaryRoot, func(n string) string { return strings.ToUpper(n) + ".;1" }},
		{isoJolietPaths, isoJolietRoot, func(n string) string { return isoUCS2(n, 0) }},
	} {
		copy(at(tree.paths), isoPath(binary.LittleEndian, tree.root))
		copy(at(tree.paths+1), isoPath(binary.BigEndian, tree.root))
		dir := at(tree.root)
		for _, self := range []string{"\x00", "\x01"} { // itself and its parent
			dir = dir[copy(dir, isoRecord(self, tree.root, isoSector, true)):]
		}
		for i, f := range files {
			dir = dir[copy(dir, isoRecord(tree.name(f.name), starts[i], len(f.data), false)):]
		}
	}
	for i, f := range files {
		copy(at(starts[i]), f.data)
	}
	return image
}

// isoASCII and isoUCS2 return text padded with spaces to size bytes.
func isoASCII(text string, size int) string { return text + strings.Repeat(" ", size-len(text)) }

func isoUCS2(text string, size int) string {
	var b []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		b = binary.BigEndian.AppendUint16(b, unit)
	}
	for len(b)+1 < size {
		b = binary.BigEndian.AppendUint16(b, ' ')
	}
	return string(b)
}

// isoVolume fills in a volume descriptor. Numbers are there in both byte orders.
func isoVolume(b []byte, kind byte, text func(string, int) string, label string, sectors, paths, root uint32) {
	b[0] = kind
	copy(b[1:], "CD001\x01")
	for _, field := range []struct{ from, to int }{
		{8, 40}, {40, 72}, {190, 318}, {318, 446}, {446, 574}, {574, 702}, {702, 739}, {739, 776}, {776, 813},
	} {
		value := ""
		if field.from == 40 {
			value = label
		}
		copy(b[field.from:field.to], text(value, field.to-field.from))
	}
	both32(b[80:], sectors)
	both16(b[120:], 1) // volumes
	both16(b[124:], 1) // this one
	both16(b[128:], isoSector)
	both32(b[132:], uint32(len(isoPath(binary.LittleEndian, root))))
	binary.LittleEndian.PutUint32(b[140:], paths)
	binary.BigEndian.PutUint32(b[148:], paths+1)
	copy(b[156:], isoRecord("\x00", root, isoSector, true))
	for _, date := range []int{813, 830, 847, 864} {
		copy(b[date:], "0000000000000000") // not given
	}
	b[881] = 1
}

// isoPath is the one entry of a table of paths: the root.
func isoPath(order binary.ByteOrder, root uint32) []byte {
	b := make([]byte, 10)
	b[0] = 1 // length of its name, which is a zero
	order.PutUint32(b[2:], root)
	order.PutUint16(b[6:], 1) // its parent: itself
	return b
}

// isoRecord is one entry of a directory.
func isoRecord(name string, sector uint32, size int, dir bool) []byte {
	b := make([]byte, (33+len(name)+1)&^1)
	b[0] = byte(len(b))
	both32(b[2:], sector)
	both32(b[10:], uint32(size))
	// 1 January 1970: the year since 1900, month, day, time, zone.
	copy(b[18:], []byte{70, 1, 1, 0, 0, 0, 0})
	if dir {
		b[25] = 2
	}
	both16(b[28:], 1) // of the one volume
	b[32] = byte(len(name))
	copy(b[33:], name)
	return b
}

func both16(b []byte, n uint16) {
	binary.LittleEndian.PutUint16(b, n)
	binary.BigEndian.PutUint16(b[2:], n)
}

func both32(b []byte, n uint32) {
	binary.LittleEndian.PutUint32(b, n)
	binary.BigEndian.PutUint32(b[4:], n)
}
