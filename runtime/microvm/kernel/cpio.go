package kernel

import (
	"bytes"
	"fmt"
)

// cpioWriter writes an initramfs: a cpio archive in the format "newc".
type cpioWriter struct {
	out   *bytes.Buffer
	inode int
}

// Types of file in st_mode.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

// entry writes one member: its header is the magic and 13 numbers of 8 hex
// digits; header with name, and content, are each padded to 4 bytes.
func (w *cpioWriter) entry(name string, mode int, data []byte) {
	w.inode++
	links := 1
	if mode&modeDir != 0 {
		links = 2
	}
	const magic = "070701"
	w.out.WriteString(magic)
	for _, field := range []int{w.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0} {
		fmt.Fprintf(w.out, "%08x", field)
	}
	w.out.WriteString(name)
	w.out.WriteByte(0)
	w.pad()
	w.out.Write(data)
	w.pad()
}

func (w *cpioWriter) pad() {
	for w.out.Len()%4 != 0 {
		w.out.WriteByte(0)
	}
}

// dir adds a directory; its parent must be there.
func (w *cpioWriter) dir(name string) { w.entry(name, modeDir|0o755, nil) }

// file adds a file with the permissions perm.
func (w *cpioWriter) file(name string, perm int, data []byte) { w.entry(name, modeFile|perm, data) }

func (w *cpioWriter) end() { w.entry("TRAILER!!!", 0, nil) }
