package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrMalformed is returned for an archive that Write did not make.
var ErrMalformed = errors.New("not an archive of files")

// malformed marks what is wrong with an archive.
func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
}

// Extract lays out under dir, an existing directory, what Write wrote with the
// same options. It never writes outside dir. Owners are set where we may; runs
// of zeros become holes. On failure, what was laid out so far remains.
func Extract(ctx context.Context, r io.Reader, dir string, o Options) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	x := &extractor{root: root, o: o, chown: os.Geteuid() == 0}
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return x.finish()
		}
		if err != nil {
			return malformed("%w", err)
		}
		if err := x.entry(ctx, h, tr); err != nil {
			return err
		}
	}
}

type extractor struct {
	root  *os.Root
	o     Options
	chown bool
	dirs  []*tar.Header // whose times are set last, since files made in them change these
	bytes int64
}

// rel turns a name of the archive into a path in the tree.
func (x *extractor) rel(name string) (string, error) {
	clean := strings.TrimSuffix(name, "/")
	if x.o.Prefix != "" {
		rest, ok := strings.CutPrefix(clean, x.o.Prefix+"/")
		if !ok {
			return "", malformed("%q does not begin with %s/", name, x.o.Prefix)
		}
		clean = rest
	}
	if clean == "" || clean == "." || path.IsAbs(clean) || path.Clean(clean) != clean ||
		clean == ".." || strings.HasPrefix(clean, "../") || strings.ContainsRune(clean, 0) {
		return "", malformed("name %q", name)
	}
	return clean, nil
}

func (x *extractor) entry(ctx context.Context, h *tar.Header, r io.Reader) error {
	rel, err := x.rel(h.Name)
	if err != nil {
		return err
	}
	if base := path.Base(rel); x.o.Overlay && strings.HasPrefix(base, whiteoutPrefix) {
		return x.whiteout(path.Dir(rel), base)
	}
	h.Name = rel
	switch h.Typeflag {
	case tar.TypeDir:
		if err := x.root.Mkdir(rel, 0o700); err != nil {
			return found(err)
		}
		x.dirs = append(x.dirs, h)
		return nil
	case tar.TypeSymlink:
		if err := x.root.Symlink(h.Linkname, rel); err != nil {
			return found(err)
		}
		return x.own(h)
	case tar.TypeLink:
		target, err := x.rel(h.Linkname)
		if err != nil {
			return err
		}
		return found(x.root.Link(target, rel))
	case tar.TypeFifo:
		if err := x.mknod(rel, unix.S_IFIFO|0o600); err != nil {
			return err
		}
		return x.attributes(h)
	case tar.TypeReg:
		return x.file(ctx, h, r)
	}
	return malformed("%q has the type %q", h.Name, h.Typeflag)
}

// found marks errors that only a malformed archive can cause, such as a second
// entry of one name.
func found(err error) error {
	if errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) ||
		errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.ELOOP) {
		return malformed("%w", err)
	}
	return err
}

func (x *extractor) file(ctx context.Context, h *tar.Header, r io.Reader) error {
	if h.Size < 0 || h.Size > 1<<62-x.bytes {
		return malformed("%q has the size %d", h.Name, h.Size)
	}
	if x.bytes += h.Size; x.o.MaxBytes > 0 && x.bytes > x.o.MaxBytes {
		return fmt.Errorf("%s: %w (%d bytes)", h.Name, ErrTooBig, x.o.MaxBytes)
	}
	f, err := x.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return found(err)
	}
	err = copySparse(f, &contextReader{ctx, r}, h.Size)
	setXattrs(f, h)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return x.attributes(h)
}

// setXattrs sets what xattrs read. A file system without attributes keeps the
// file without them.
func setXattrs(f *os.File, h *tar.Header) {
	for name, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(name, xattrPrefix); ok && keptXattr(attr) {
			_ = unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0)
		}
	}
}

// hole is the unit in which runs of zeros become holes, in bytes.
const hole = 4096

// copySparse copies size bytes and leaves out blocks of zeros.
func copySparse(f *os.File, r io.Reader, size int64) error {
	var buf, zero [64 * hole]byte
	for off := int64(0); off < size; {
		n, err := io.ReadFull(r, buf[:min(int64(len(buf)), size-off)])
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return malformed("%s ends early", f.Name())
			}
			return err
		}
		for i := 0; i < n; i += hole {
			block := buf[i:min(i+hole, n)]
			if bytes.Equal(block, zero[:len(block)]) {
				continue
			}
			if _, err := f.WriteAt(block, off+int64(i)); err != nil {
				return err
			}
		}
		off += int64(n)
	}
	return f.Truncate(size)
}

// whiteout makes what stands for a removal in an overlay's upper directory.
func (x *extractor) whiteout(dir, base string) error {
	if base == opaqueName {
		f, err := x.root.Open(dir)
		if err != nil {
			return found(err)
		}
		defer f.Close()
		return unix.Fsetxattr(int(f.Fd()), x.o.opaqueXattr(), []byte("y"), 0)
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return malformed("whiteout %q", base)
	}
	return x.mknod(path.Join(dir, name), unix.S_IFCHR) // its owner does not matter
}

// mknod makes a pipe or a character device 0:0.
func (x *extractor) mknod(rel string, mode uint32) error {
	dir, err := x.root.Open(path.Dir(rel))
	if err != nil {
		return found(err)
	}
	defer dir.Close()
	return found(unix.Mknodat(int(dir.Fd()), path.Base(rel), mode, 0))
}

// attributes sets owner, mode and time, in the order in which they do not undo
// each other.
func (x *extractor) attributes(h *tar.Header) error {
	if err := x.own(h); err != nil {
		return err
	}
	if err := x.root.Chmod(h.Name, fileMode(h.Mode)); err != nil {
		return err
	}
	return x.root.Chtimes(h.Name, time.Time{}, h.ModTime)
}

func (x *extractor) own(h *tar.Header) error {
	if x.o.Owner != nil {
		return x.root.Lchown(h.Name, x.o.Owner.UID, x.o.Owner.GID)
	}
	if !x.chown {
		return nil
	}
	return x.root.Lchown(h.Name, h.Uid, h.Gid)
}

// finish sets what directories are like, deepest first.
func (x *extractor) finish() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		f, err := x.root.Open(x.dirs[i].Name)
		if err != nil {
			return err
		}
		setXattrs(f, x.dirs[i])
		f.Close()
		if err := x.attributes(x.dirs[i]); err != nil {
			return err
		}
	}
	return nil
}

// fileMode turns permission bits as the kernel has them into Go's.
func fileMode(mode int64) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}
