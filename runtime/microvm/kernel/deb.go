package kernel

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// unpackDeb writes the kernel's boot image, the modules and the list of built-in
// ones that a Debian package holds into dir, without their folders. It returns
// the path of the boot image, empty when the package has none.
func unpackDeb(file, dir string) (image string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := debData(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	archive := tar.NewReader(data)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return image, nil
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		base := path.Base(h.Name)
		boot := strings.HasPrefix(base, "vmlinuz-")
		if h.Typeflag != tar.TypeReg || !boot && moduleName(base) == "" && base != builtinName {
			continue
		}
		target := filepath.Join(dir, base)
		if boot {
			image = target
		}
		if err := spill(target, archive); err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
	}
}

// spill writes a file that need not survive a crash.
func spill(target string, r io.Reader) error {
	out, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(out, io.LimitReader(r, maxDownload))
	if err == nil && n == maxDownload {
		err = errors.New("a file of the package is too big")
	}
	return errors.Join(err, out.Close())
}

// debData finds the archive of files in a Debian package, which is an ar
// archive: 8 bytes of magic, then members, each with a header of 60 bytes in
// ASCII (name 16, time 12, owner 6, group 6, mode 8, size 10, end 2), padded to an even size.
func debData(r io.Reader) (io.Reader, error) {
	const magic = "!<arch>\n"
	var head [60]byte
	if _, err := io.ReadFull(r, head[:len(magic)]); err != nil || string(head[:len(magic)]) != magic {
		return nil, errors.New("not a Debian package")
	}
	const maxMembers = 16
	for range maxMembers {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return nil, fmt.Errorf("no files in the package: %w", err)
		}
		name := strings.TrimRight(string(head[:16]), " /")
		size, err := strconv.ParseInt(strings.TrimSpace(string(head[48:58])), 10, 64)
		if err != nil || size < 0 || string(head[58:]) != "`\n" {
			return nil, errors.New("the package is damaged")
		}
		if suffix, ok := strings.CutPrefix(name, "data.tar"); ok {
			return plainTar(suffix, io.LimitReader(r, size))
		}
		if _, err := io.CopyN(io.Discard, r, size+size%2); err != nil {
			return nil, fmt.Errorf("the package is cut short: %w", err)
		}
	}
	return nil, errors.New("no files in the package")
}

func plainTar(suffix string, r io.Reader) (io.Reader, error) {
	switch suffix {
	case "":
		return r, nil
	case ".gz":
		return gzip.NewReader(r)
	case ".xz":
		return xz.NewReader(bufio.NewReader(r))
	case ".zst":
		return zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
	}
	return nil, fmt.Errorf("unknown compression %q of the package", suffix)
}
