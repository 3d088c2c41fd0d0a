// Package layer writes directory trees as OCI layers and lays them out again.
//
// A tree may belong to a hostile sandbox, and its processes may change it
// meanwhile: nothing outside the tree is ever opened, whatever links it holds,
// and a file that shrinks or grows makes no broken archive.
package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The names that stand for removal in OCI layers.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// Options says what a tree is and how its archive looks.
type Options struct {
	// Prefix is put before every name in the archive: a clean relative path,
	// empty for none.
	Prefix string
	// Overlay says that the tree is the upper directory of an overlay file
	// system, where character devices 0:0 and an attribute stand for removal.
	Overlay bool
	// UserXattr says that this overlay was mounted with the option userxattr.
	UserXattr bool
	// Skip leaves out what is at rel, a clean path relative to the tree, and all
	// below it. Nil: nothing is left out.
	Skip func(rel string) bool
	// MaxBytes bounds the sum of file sizes, holes included; 0: no bound.
	MaxBytes int64
	// Owner gets all that is laid out; nil: whom the archive names, if we are root.
	Owner *Owner
}

// Owner is a user and a group.
type Owner struct{ UID, GID int }

// opaqueXattr is the attribute of an overlay's directory that hides what is below.
func (o Options) opaqueXattr() string {
	if o.UserXattr {
		return "user.overlay.opaque"
	}
	return "trusted.overlay.opaque"
}

// ErrTooBig is returned when a tree exceeds Options.MaxBytes.
var ErrTooBig = errors.New("the files are bigger than allowed")

// Write writes the tree under dir as a tar stream. Directories come before what
// is in them; sockets and devices are left out.
func Write(ctx context.Context, w io.Writer, dir string, o Options) error {
	return WriteTrees(ctx, w, Tree{dir, o})
}

// Tree is a directory to write and what it is.
type Tree struct {
	Dir string
	Options
}

// WriteTrees writes several trees, one after the other, as one tar stream.
func WriteTrees(ctx context.Context, w io.Writer, trees ...Tree) error {
	tw := &writer{ctx: ctx, tar: tar.NewWriter(w), links: map[inode]string{}}
	for _, t := range trees {
		root, err := os.OpenRoot(t.Dir)
		if err != nil {
			return err
		}
		tw.o, tw.bytes = t.Options, 0
		if err := tw.tree(root, "", 0); err != nil {
			return err
		}
	}
	return tw.tar.Close()
}

// inode names a file that may have several names.
type inode struct{ dev, ino uint64 }

type writer struct {
	ctx   context.Context
	tar   *tar.Writer
	o     Options
	links map[inode]string // first name of each file with more than one
	bytes int64
}

// maxDepth bounds how deep directories may lie in each other. Path names of
// Linux end at half of it.
const maxDepth = 4096

// tree writes what is in the directory dir, which is at rel, and closes it.
func (w *writer) tree(dir *os.Root, rel string, depth int) error {
	defer dir.Close()
	if depth > maxDepth {
		return fmt.Errorf("directories lie more than %d deep", maxDepth)
	}
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		// What vanishes while we walk is as if it had not been there.
		if err := w.entry(dir, name, path.Join(rel, name), depth); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// entry writes what is called base in dir, and all below it. It is at rel.
func (w *writer) entry(dir *os.Root, base, rel string, depth int) error {
	if w.o.Skip != nil && w.o.Skip(rel) {
		return nil
	}
	info, err := dir.Lstat(base)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no status from the operating system", rel)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: path.Join(w.o.Prefix, rel), Mode: int64(st.Mode & 0o7777), ModTime: info.ModTime(),
		Uid: int(st.Uid), Gid: int(st.Gid),
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return w.directory(dir, base, rel, depth, h)
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = dir.Readlink(base); err != nil {
			return err
		}
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice | fs.ModeCharDevice:
		if !w.o.Overlay || st.Rdev != 0 {
			return nil
		}
		h.Typeflag, h.Mode = tar.TypeReg, 0
		h.Name = path.Join(path.Dir(h.Name), whiteoutPrefix+base)
	case 0:
		return w.file(dir, base, rel, h, st)
	default:
		return nil
	}
	return w.tar.WriteHeader(h)
}

func (w *writer) directory(dir *os.Root, base, rel string, depth int, h *tar.Header) error {
	sub, err := dir.OpenRoot(base)
	if err != nil {
		return err
	}
	f, err := sub.Open(".")
	if err != nil {
		sub.Close()
		return err
	}
	h.PAXRecords = xattrs(f)
	opaque := w.o.Overlay && getXattr(f, w.o.opaqueXattr()) == "y"
	f.Close()

	name := h.Name
	h.Typeflag, h.Name = tar.TypeDir, name+"/"
	err = w.tar.WriteHeader(h)
	if err == nil && opaque {
		err = w.tar.WriteHeader(&tar.Header{Format: tar.FormatPAX, Name: path.Join(name, opaqueName), Typeflag: tar.TypeReg})
	}
	if err != nil {
		sub.Close()
		return err
	}
	return w.tree(sub, rel, depth+1)
}

func (w *writer) file(dir *os.Root, base, rel string, h *tar.Header, st *syscall.Stat_t) error {
	h.Typeflag = tar.TypeReg
	key := inode{st.Dev, st.Ino}
	if first, seen := w.links[key]; seen {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return w.tar.WriteHeader(h)
	}
	// The name may have become something else since we looked: O_NONBLOCK keeps
	// a pipe from holding us up.
	f, err := dir.OpenFile(base, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	now, err := f.Stat()
	if err != nil {
		return err
	}
	if !now.Mode().IsRegular() {
		return nil
	}
	h.Size = now.Size()
	h.PAXRecords = xattrs(f)
	if w.bytes += h.Size; w.o.MaxBytes > 0 && w.bytes > w.o.MaxBytes {
		return fmt.Errorf("%s: %w (%d bytes)", rel, ErrTooBig, w.o.MaxBytes)
	}
	if err := w.tar.WriteHeader(h); err != nil {
		return err
	}
	if st.Nlink > 1 {
		w.links[key] = h.Name
	}
	n, err := io.Copy(w.tar, &contextReader{w.ctx, io.LimitReader(f, h.Size)})
	if err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	if n < h.Size { // it shrank: what is missing reads as zeros
		_, err = io.CopyN(w.tar, zeros{}, h.Size-n)
	}
	return err
}

// contextReader fails when its context ends, so that a huge file does not
// outlast its caller.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// zeros reads as zeros without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// xattrPrefix is how extended attributes are called in PAX records.
const xattrPrefix = "SCHILY.xattr."

// keptXattr reports whether an extended attribute belongs to the file and not
// to the overlay file system that it is stored in.
func keptXattr(name string) bool {
	return name == "security.capability" ||
		strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay.")
}

// xattrs reads the attributes worth keeping, in the form of PAX records. A file
// system without attributes has none.
func xattrs(f *os.File) map[string]string {
	list := make([]byte, 64<<10) // the kernel's own limit
	n, err := unix.Flistxattr(int(f.Fd()), list)
	if err != nil || n == 0 {
		return nil
	}
	records := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if keptXattr(name) && !strings.Contains(name, "=") {
			records[xattrPrefix+name] = getXattr(f, name)
		}
	}
	return records
}

// getXattr returns the value of an attribute; empty when there is none.
func getXattr(f *os.File, name string) string {
	value := make([]byte, 64<<10) // the kernel's own limit
	n, err := unix.Fgetxattr(int(f.Fd()), name, value)
	if err != nil {
		return ""
	}
	return string(value[:n])
}
