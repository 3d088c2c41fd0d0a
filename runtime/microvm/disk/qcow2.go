package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/atoll-run/atoll/sandbox"
)

// The format: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
const (
	qcowMagic     = "QFI\xfb"
	qcowVersion   = 3
	clusterBits   = 16
	cluster       = 1 << clusterBits
	headerLength  = 104
	refcountOrder = 4 // 16 bits
	// tableSpan is how many bytes of the disk one entry of the first table covers.
	tableSpan = cluster * cluster / 8
	// maxLayer is the size in bytes up to which that table fits into one cluster.
	maxLayer = tableSpan * cluster / 8
)

// MakeLayer makes a file with an empty qcow2 layer for a disk of size bytes, which
// replaces what is at path. It names no file below it: whoever opens it says what
// it stands on. The file is sparse, and not synced.
func MakeLayer(path string, size int64) error {
	const op = "disk.MakeLayer"
	if size <= 0 || size > maxLayer {
		return sandbox.Errorf(op, sandbox.Invalid, path, "a disk of %d bytes", size)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return sandbox.E(op, kindOf(err), path, err)
	}
	// Four clusters: the header, the table of reference counts, one block of these,
	// and the first table of addresses, which is empty.
	counts := make([]byte, 0, 8)
	for range 4 {
		counts = binary.BigEndian.AppendUint16(counts, 1)
	}
	err = f.Truncate(4 * cluster)
	for _, part := range []struct {
		data []byte
		at   int64
	}{
		{layerHeader(size), 0},
		{binary.BigEndian.AppendUint64(nil, 2*cluster), cluster},
		{counts, 2 * cluster},
	} {
		if err == nil {
			_, err = f.WriteAt(part.data, part.at)
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return sandbox.E(op, kindOf(err), path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

// layerHeader returns the header of a layer as MakeLayer lays it out.
func layerHeader(size int64) []byte {
	var b bytes.Buffer
	b.WriteString(qcowMagic)
	for _, field := range []any{
		uint32(qcowVersion),
		uint64(0), uint32(0), // name of the file below: none
		uint32(clusterBits), uint64(size),
		uint32(0), // no encryption
		uint32((size + tableSpan - 1) / tableSpan), // entries of the first table
		uint64(3 * cluster),                        // where that is
		uint64(cluster), uint32(1),                 // the table of reference counts: where, clusters
		uint32(0), uint64(0), // no snapshots
		uint64(0), uint64(0), uint64(0), // no features
		uint32(refcountOrder), uint32(headerLength),
		uint32(0), uint32(0), // end of extensions
	} {
		_ = binary.Write(&b, binary.BigEndian, field) // a Buffer takes everything
	}
	return b.Bytes()
}

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

// Inspect reads what a user's disk image is. It refuses one that refers to other
// files, by which its author could read the host's, and one that is encrypted.
func Inspect(path string) (Image, error) {
	const op = "disk.Inspect"
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
	head := make([]byte, 512)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return Image{}, sandbox.E(op, "", path, err)
	}
	img, err := inspect(head[:n], info.Size())
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, path, err)
	}
	return img, nil
}

// foreignMagics begin images of formats that would be taken for raw disks.
var foreignMagics = map[string]string{
	"KDMV": "VMDK", "vhdxfile": "VHDX", "conectix": "VHD", "QED\x00": "QED", "LUKS\xba\xbe": "LUKS", "<<< ": "VDI", "\x1f\x8b": "gzip", "\xfd7zXZ": "xz", "\x28\xb5\x2f\xfd": "zstd", "PK\x03\x04": "zip",
}

// inspect tells an image from its first bytes and its file's size.
func inspect(head []byte, size int64) (Image, error) {
	if !bytes.HasPrefix(head, []byte(qcowMagic)) {
		for magic, name := range foreignMagics {
			if bytes.HasPrefix(head, []byte(magic)) {
				return Image{}, fmt.Errorf("images in the format %s cannot be used: convert it to qcow2 or raw", name)
			}
		}
		if size < 512 {
			return Image{}, errors.New("too small for a disk")
		}
		return Image{Raw, size}, nil
	}
	if len(head) < 72 {
		return Image{}, errors.New("the qcow2 image is cut short")
	}
	u32, u64 := binary.BigEndian.Uint32, binary.BigEndian.Uint64
	version, backing, encryption := u32(head[4:]), u64(head[8:]), u32(head[32:])
	disk := u64(head[24:])
	var incompatible uint64
	if version >= qcowVersion {
		if len(head) < headerLength {
			return Image{}, errors.New("the qcow2 image is cut short")
		}
		incompatible = u64(head[72:])
	}
	const dirty, corrupt, external, compression, extended = 1, 2, 4, 8, 16
	switch {
	case version < 2 || version > qcowVersion:
		return Image{}, fmt.Errorf("version %d of qcow2", version)
	case backing != 0:
		return Image{}, errors.New("the image stands on another one: flatten it with qemu-img convert")
	case encryption != 0:
		return Image{}, errors.New("the image is encrypted")
	case incompatible&external != 0:
		return Image{}, errors.New("the image keeps its data in another file")
	case incompatible&corrupt != 0:
		return Image{}, errors.New("the image is marked as corrupt")
	case incompatible&^(dirty|corrupt|external|compression|extended) != 0:
		return Image{}, errors.New("the image has features that are not known")
	case disk == 0 || disk > 1<<62:
		return Image{}, fmt.Errorf("a disk of %d bytes", disk)
	}
	return Image{QCOW2, int64(disk)}, nil
}
