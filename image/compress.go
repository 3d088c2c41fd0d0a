package image

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxWindow bounds the memory that a compressed stream may ask for. It admits
// the highest ordinary levels of zstd and xz.
const maxWindow = 128 << 20

// decompress returns the plain form of r, told from its first bytes. The result
// must be closed; that leaves r open.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch compression(head) {
	case "gzip":
		return gzip.NewReader(b)
	case "zstd":
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case "xz":
		x, err := xz.ReaderConfig{DictCap: 1 << 20}.NewReader(b)
		return io.NopCloser(x), err
	case "bzip2":
		return io.NopCloser(bzip2.NewReader(b)), nil
	}
	return io.NopCloser(b), nil
}

// compression names the format that the first bytes announce; empty for none.
func compression(head []byte) string {
	for name, magic := range map[string]string{
		"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ\x00", "bzip2": "BZh",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return name
		}
	}
	return ""
}

// tarSource opens a layer kept in a file: plain ones are read in place, with at
// not nil; others through a decompressor.
func tarSource(f *os.File) (r io.ReadCloser, at io.ReaderAt, err error) {
	var head [6]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	section := io.NewSectionReader(f, 0, info.Size())
	if compression(head[:n]) == "" {
		return seekCloser{section}, f, nil
	}
	r, err = decompress(section)
	if err != nil {
		return nil, nil, fmt.Errorf("compressed layer: %w", err)
	}
	return r, nil, nil
}

// seekCloser is a section with a Close that does nothing.
type seekCloser struct{ *io.SectionReader }

func (seekCloser) Close() error { return nil }

// addFile applies the layer in f, which must stay open as long as the tree.
func (u *unpacker) addFile(ctx context.Context, f *os.File) error {
	r, at, err := tarSource(f)
	if err != nil {
		return err
	}
	defer r.Close()
	return u.addTar(ctx, r, at)
}
