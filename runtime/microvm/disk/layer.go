package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
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
