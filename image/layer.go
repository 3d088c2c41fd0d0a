package image

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
)

// Limits bounds what an archive may unfold to, so that a small hostile one
// cannot fill the host's disk or memory. Zero means the default.
type Limits struct {
	Bytes   int64 // contents of all files of all layers together; default 64 GiB
	Entries int   // paths of all layers together; default 2 million, some 500 bytes of memory each
}

func (l Limits) withDefaults() Limits {
	if l.Bytes == 0 {
		l.Bytes = 64 << 30
	}
	if l.Entries == 0 {
		l.Entries = 2_000_000
	}
	return l
}

// Names by which a layer hides what is beneath it.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // file systems' own bookkeeping, except:
	whiteoutOpaque = ".wh..wh..opq"
)

// unpacker applies layers to a tree, lowest first. It never touches the host
// but for its spool.
type unpacker struct {
	tree   *tree
	limits Limits
	xattrs bool     // keep extended attributes
	ignore []string // clean relative paths that layers do not change

	// spool holds the contents of files that cannot be read where they are:
	// those of compressed and sparse archives. An unnamed file.
	spool     *os.File
	spoolSize int64

	bytes   int64 // seen so far, for the limits
	entries int
}

func newUnpacker(tmpDir string, limits Limits, xattrs bool) (*unpacker, error) {
	spool, err := os.CreateTemp(tmpDir, "spool-")
	if err != nil {
		return nil, err
	}
	// A sweep may have come before us.
	if err := os.Remove(spool.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(err, spool.Close())
	}
	return &unpacker{tree: newTree(), limits: limits.withDefaults(), xattrs: xattrs, spool: spool}, nil
}

// Close frees the spool; the tree's files cannot be read any more.
func (u *unpacker) Close() error { return u.spool.Close() }

// addTar applies one layer. When at is not nil, r reads the same bytes through
// r.Seek and contents stay in at; otherwise they are copied to the spool.
func (u *unpacker) addTar(ctx context.Context, r io.Reader, at io.ReaderAt) error {
	u.tree.nextLayer()
	tr := tar.NewReader(r)
	for count := 0; ; count++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		switch {
		case err == io.EOF && count == 0:
			return errors.New("the archive is empty")
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("not a readable tar archive: %w", err)
		}
		if u.entries++; u.entries > u.limits.Entries {
			return fmt.Errorf("more than %d files", u.limits.Entries)
		}
		if err := u.addEntry(ctx, tr, h, r, at); err != nil {
			return err
		}
	}
}

func (u *unpacker) addEntry(ctx context.Context, tr *tar.Reader, h *tar.Header, r io.Reader, at io.ReaderAt) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if slices.Contains(u.ignore, path.Clean(strings.TrimPrefix(h.Name, "/"))) {
		return nil
	}
	dir, base := path.Split(strings.TrimSuffix(h.Name, "/"))
	if strings.HasPrefix(base, whiteoutPrefix) {
		return u.whiteout(dir, base)
	}
	n := &inode{
		mode:  uint16(h.Mode & 0o7777),
		uid:   uint32(h.Uid),
		gid:   uint32(h.Gid),
		mtime: h.ModTime.Unix(),
		nsec:  uint32(h.ModTime.Nanosecond()),
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32 || int64(h.Gid) >= 1<<32 {
		return fmt.Errorf("path %q: owner %d:%d is out of range", h.Name, h.Uid, h.Gid)
	}
	if err := u.addXattrs(n, h); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		n.mode |= typeDir
		n.children = map[string]*inode{}
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n.mode |= typeReg
		if err := u.addData(ctx, n, tr, h, r, at); err != nil {
			return fmt.Errorf("path %q: %w", h.Name, err)
		}
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxTarget || strings.IndexByte(h.Linkname, 0) >= 0 {
			return fmt.Errorf("path %q: symbolic link to an impossible target", h.Name)
		}
		n.mode = typeSymlink | 0o777
		n.target = h.Linkname
	case tar.TypeLink:
		return u.tree.link(h.Linkname, h.Name)
	case tar.TypeFifo:
		n.mode |= typeFifo
	case tar.TypeChar, tar.TypeBlock:
		return refuseDevice(h.Name)
	default:
		return fmt.Errorf("path %q: entries of type %q are not supported", h.Name, h.Typeflag)
	}
	return u.tree.put(h.Name, n)
}

// refuseDevice lets device nodes below /dev pass unseen, since every sandbox
// brings a /dev of its own, and refuses them anywhere else: there they are of
// no honest use.
func refuseDevice(name string) error {
	parts, err := splitPath(name)
	if err != nil {
		return err
	}
	if len(parts) > 1 && parts[0] == "dev" {
		return nil
	}
	return fmt.Errorf("path %q is a device node outside /dev", name)
}

func (u *unpacker) whiteout(dir, base string) error {
	switch {
	case base == whiteoutOpaque:
		return u.tree.opaque(dir)
	case strings.HasPrefix(base, whiteoutMeta):
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("path %q hides nothing that can exist", dir+base)
	}
	return u.tree.hide(dir + hidden)
}

const (
	paxXattr  = "SCHILY.xattr."
	paxSparse = "GNU.sparse."
)

// addXattrs keeps the attributes that mean something inside a sandbox. Those of
// overlayfs would change how the host stacks the root, and are dropped.
func (u *unpacker) addXattrs(n *inode, h *tar.Header) error {
	if !u.xattrs {
		return nil
	}
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		if _, _, ok := xattrIndex(name); !ok {
			continue
		}
		if n.xattrs == nil {
			n.xattrs = map[string]string{}
		}
		n.xattrs[name] = value
	}
	if _, err := encodeXattrs(n.xattrs); err != nil {
		return fmt.Errorf("path %q: %w", h.Name, err)
	}
	return nil
}

func (u *unpacker) addData(ctx context.Context, n *inode, tr *tar.Reader, h *tar.Header, r io.Reader, at io.ReaderAt) error {
	if u.bytes += h.Size; h.Size < 0 || u.bytes > u.limits.Bytes {
		return fmt.Errorf("contents are larger than the limit of %d bytes", u.limits.Bytes)
	}
	if h.Size == 0 {
		return nil
	}
	if at != nil && !sparse(h) {
		off, err := r.(io.Seeker).Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		n.data = io.NewSectionReader(at, off, h.Size)
		return nil
	}
	written, err := io.Copy(io.NewOffsetWriter(u.spool, u.spoolSize), contextReader{ctx, tr})
	if err != nil {
		return err
	}
	if written != h.Size {
		return io.ErrUnexpectedEOF
	}
	n.data = io.NewSectionReader(u.spool, u.spoolSize, h.Size)
	u.spoolSize += h.Size
	return nil
}

func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, paxSparse) {
			return true
		}
	}
	return false
}

// contextReader fails once its context has ended.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
