package kernel

import (
	"bytes"
	"compress/bzip2"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// image is a kernel as a machine gets it.
type image struct {
	data    []byte
	version string // empty when it does not say
}

// Where a bzImage's header has its fields, as the Linux boot protocol defines.
const (
	bzSetupSects    = 0x1f1 // byte: length of the setup code in sectors, less the boot sector
	bzMagic         = 0x202 // "HdrS"
	bzProtocol      = 0x206 // two bytes
	bzVersion       = 0x20e // two bytes: where the version's text is, less 0x200
	bzPayload       = 0x248 // four bytes: where the payload is, from the end of the setup code
	bzPayloadLength = 0x24c // four bytes
	bzHeaderEnd     = 0x250
	sector          = 512
	// bzProtocolPayload is the first version of the protocol that names the payload.
	bzProtocolPayload = 0x208
)

// maxKernel bounds the size of a kernel in bytes.
const maxKernel = 512 << 20

var errNoKernel = errors.New("neither a vmlinux nor a bzImage")

// extract returns the kernel in an ELF vmlinux or a bzImage. A bzImage whose
// content cannot be taken out, or entered directly, is returned as it is.
func extract(data []byte) (image, error) {
	if bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		if !hasPVH(data) {
			return image{}, errors.New("the kernel has no PVH entry (CONFIG_PVH): give its bzImage instead")
		}
		return image{data, elfVersion(data)}, nil
	}
	if len(data) < bzHeaderEnd || string(data[bzMagic:bzMagic+4]) != "HdrS" {
		return image{}, errNoKernel
	}
	img := image{data, bzImageVersion(data)}
	payload, err := bzImagePayload(data)
	if err != nil {
		return image{}, err
	}
	r, err := decompress(payload)
	if err != nil {
		return img, nil
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxKernel))
	// Behind the compressed data there may be its size, which some readers dislike.
	if len(plain) == 0 || err != nil && !hasPVH(plain) {
		return img, nil
	}
	if hasPVH(plain) {
		img.data = plain
	}
	return img, nil
}

func bzImageVersion(data []byte) string {
	at := int(binary.LittleEndian.Uint16(data[bzVersion:])) + 0x200
	if at == 0x200 || at >= len(data) {
		return ""
	}
	const longest = 256
	return firstWord(data[at:min(len(data), at+longest)])
}

// firstWord returns what precedes the first space or NUL.
func firstWord(text []byte) string {
	if i := bytes.IndexAny(text, " \x00"); i >= 0 {
		text = text[:i]
	}
	return strings.ToValidUTF8(string(text), "?")
}

func bzImagePayload(data []byte) ([]byte, error) {
	if v := binary.LittleEndian.Uint16(data[bzProtocol:]); v < bzProtocolPayload {
		return nil, fmt.Errorf("boot protocol %#x is too old", v)
	}
	setup := int64(data[bzSetupSects])
	if setup == 0 {
		setup = 4 // as the protocol says
	}
	from := (setup+1)*sector + int64(binary.LittleEndian.Uint32(data[bzPayload:]))
	to := from + int64(binary.LittleEndian.Uint32(data[bzPayloadLength:]))
	if to > int64(len(data)) {
		return nil, errors.New("the bzImage is cut short")
	}
	return data[from:to], nil
}

// decompress returns the plain form of data, told from its first bytes.
func decompress(data []byte) (io.Reader, error) {
	r := bytes.NewReader(data)
	for magic, open := range map[string]func() (io.Reader, error){
		"\x1f\x8b":         func() (io.Reader, error) { return gzip.NewReader(r) },
		"\x28\xb5\x2f\xfd": func() (io.Reader, error) { return zstd.NewReader(r, zstd.WithDecoderConcurrency(1)) },
		"\xfd7zXZ\x00":     func() (io.Reader, error) { return xz.NewReader(r) },
		"\x02\x21\x4c\x18": func() (io.Reader, error) { return lz4.NewReader(r), nil },
		"BZh":              func() (io.Reader, error) { return bzip2.NewReader(r), nil },
		"\x5d\x00\x00":     func() (io.Reader, error) { return lzma.NewReader(r) },
		elf.ELFMAG:         func() (io.Reader, error) { return r, nil },
	} {
		if bytes.HasPrefix(data, []byte(magic)) {
			return open()
		}
	}
	return nil, errors.New("unknown compression")
}

// hasPVH reports whether data is an ELF kernel with the note of an entry point
// for direct boot.
func hasPVH(data []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err == nil && noteOf(notes, "Xen\x00", 18) { // XEN_ELFNOTE_PHYS32_ENTRY
			return true
		}
	}
	return false
}

// noteOf reports whether there is a note of that name and type. A note is the
// lengths of its name and its content and its type, four bytes each, then both,
// padded to four bytes.
func noteOf(notes []byte, name string, kind uint32) bool {
	pad := func(n uint32) int64 { return (int64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		names, content := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:])
		size := 12 + pad(names) + pad(content)
		if size > int64(len(notes)) {
			return false
		}
		if binary.LittleEndian.Uint32(notes[8:]) == kind && string(notes[12:12+names]) == name {
			return true
		}
		notes = notes[size:]
	}
	return false
}

// elfVersion finds the version in a vmlinux by the kernel's greeting.
func elfVersion(data []byte) string {
	const greeting = "Linux version "
	i := bytes.Index(data, []byte(greeting))
	for ; i >= 0; i++ {
		rest := data[i+len(greeting):]
		if len(rest) > 0 && rest[0] >= '0' && rest[0] <= '9' {
			return firstWord(rest[:min(len(rest), 256)])
		}
		next := bytes.Index(rest, []byte(greeting))
		if next < 0 {
			break
		}
		i += len(greeting) + next - 1
	}
	return ""
}
