package server

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pack answers GET /archive.
func (s *Server) pack(w http.ResponseWriter, r *http.Request) {
	root, _, ok := s.archivePath(w, r)
	if !ok {
		return
	}
	info, err := os.Stat(root)
	if err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		writeError(w, http.StatusBadRequest, fmt.Sprintf("path '%s' is neither a directory nor a file", root))
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	var out io.Writer = w
	if wantsGzip(r) {
		w.Header().Set("Content-Encoding", "gzip")
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		defer z.Close()
		out = z
	}
	users, groups := loadAccounts().names()
	p := packer{tar: tar.NewWriter(out), users: users, groups: groups, buf: make([]byte, copyBuffer)}
	if info.IsDir() {
		err = p.tree(root)
	} else {
		err = p.add(root, filepath.Base(root), info)
	}
	if err == nil {
		err = p.tar.Close()
	}
	if err != nil {
		s.Log.Debug("archive cut", "path", root, "error", err)
		// The status is out already: cutting the stream is how the client learns.
		panic(http.ErrAbortHandler)
	}
}

func (s *Server) archivePath(w http.ResponseWriter, r *http.Request) (string, account, bool) {
	acct, err := s.settings.account(requestUser(r))
	if err != nil {
		writeError(w, http.StatusUnauthorized, err.Error())
		return "", acct, false
	}
	root, err := s.settings.resolve(r.URL.Query().Get("path"), acct)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return "", acct, false
	}
	return root, acct, true
}

// packer writes files into a tar stream.
type packer struct {
	tar           *tar.Writer
	users, groups map[uint32]string
	buf           []byte
}

// tree adds a directory with all below it, except kernel file systems such as
// /proc, which have no end. The directory itself is the entry "./".
func (p *packer) tree(root string) error {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) && path != root {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && isKernelMount(path) {
			return fs.SkipDir
		}
		info, err := d.Info()
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return p.add(path, "."+strings.TrimPrefix(path, root), info)
	})
}

func (p *packer) add(path, name string, info os.FileInfo) error {
	link := ""
	mode := info.Mode()
	switch {
	case mode.IsDir():
		name += "/"
	case mode&os.ModeSymlink != 0:
		var err error
		if link, err = os.Readlink(path); err != nil {
			return nil // replaced meanwhile
		}
	case !mode.IsRegular():
		return nil // sockets, pipes and devices mean nothing elsewhere
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name = strings.TrimPrefix(name, "/")
	header.Format = tar.FormatPAX
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		header.Uname, header.Gname = p.users[st.Uid], p.groups[st.Gid]
	}
	if !mode.IsRegular() {
		return p.tar.WriteHeader(header)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tar.WriteHeader(header); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{p.tar}, io.LimitReader(f, header.Size), p.buf)
	if err != nil {
		return err
	}
	// A file that shrank while it was read is filled up with zeros, as tar does.
	clear(p.buf)
	for rest := header.Size - n; rest > 0; {
		n, err := p.tar.Write(p.buf[:min(rest, int64(len(p.buf)))])
		if err != nil {
			return err
		}
		rest -= int64(n)
	}
	return nil
}

func isKernelMount(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
		unix.DEVPTS_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC:
		return true
	}
	return false
}

// unpack answers POST /archive.
func (s *Server) unpack(w http.ResponseWriter, r *http.Request) {
	root, acct, ok := s.archivePath(w, r)
	if !ok {
		return
	}
	in, err := body(r)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	if err := makeDirs(root, acct); err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	dir, err := os.OpenRoot(root)
	if err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	defer dir.Close()
	u := unpacker{root: dir, acct: acct, chown: canSwitch(), buf: make([]byte, copyBuffer)}
	if err := u.all(r.Context(), tar.NewReader(in)); err != nil {
		code := http.StatusBadRequest
		if isNoSpace(err) {
			code = http.StatusInsufficientStorage
		}
		writeError(w, code, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// unpacker extracts a tar stream below root. The stream is not trusted: os.Root
// keeps every operation below root, whatever names and symlinks it holds.
type unpacker struct {
	root  *os.Root
	acct  account
	chown bool
	buf   []byte
	dirs  []dirTime
}

// dirTime is the time of a directory, set when nothing more is put into it.
type dirTime struct {
	name  string
	mtime time.Time
}

// maxDirTimes bounds the directories whose times are remembered; those beyond
// have the time of extraction.
const maxDirTimes = 100_000

func (u *unpacker) all(ctx context.Context, in *tar.Reader) error {
	// A sparse file of a few bytes can stand for endless zeros: stop writing
	// them when nobody waits any more.
	content := whileWanted{ctx, in}
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		if err := u.entry(h, content); err != nil {
			return fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
	}
	for i := len(u.dirs) - 1; i >= 0; i-- {
		// Best effort: the directory may have been replaced by a later entry.
		_ = u.root.Chtimes(u.dirs[i].name, u.dirs[i].mtime, u.dirs[i].mtime)
	}
	return nil
}

// whileWanted reads until the caller of a request is gone.
type whileWanted struct {
	ctx context.Context
	io.Reader
}

func (w whileWanted) Read(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.Reader.Read(b)
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	if !filepath.IsLocal(name) {
		return errors.New("the name leaves the directory")
	}
	mode := fs.FileMode(h.Mode & 0o777)
	for bit, to := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if h.Mode&bit != 0 {
			mode |= to
		}
	}
	if h.Typeflag == tar.TypeDir {
		return u.directory(name, mode, h.ModTime)
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // what git archive begins with
	}
	if name == "." {
		return errors.New("only a directory can be the root")
	}
	if parent := path.Dir(name); parent != "." {
		if err := u.parents(parent); err != nil {
			return err
		}
	}
	if info, err := u.root.Lstat(name); err == nil && info.IsDir() {
		return errors.New("a directory is in the way")
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return u.place(name, func(temp string) error { return u.file(temp, mode, h.ModTime, content) })
	case tar.TypeSymlink:
		return u.place(name, func(temp string) error {
			if err := u.root.Symlink(h.Linkname, temp); err != nil {
				return err
			}
			return u.own(temp)
		})
	case tar.TypeLink:
		target := path.Clean(h.Linkname)
		if !filepath.IsLocal(target) {
			return errors.New("the link leaves the directory")
		}
		return u.place(name, func(temp string) error { return u.root.Link(target, temp) })
	}
	return fmt.Errorf("entries of type %q are not extracted", h.Typeflag)
}

// place has an entry made beside its place and moves it there when it is whole:
// whatever fails, what was there before stays. Nothing is written through a
// symlink in its place, since moving replaces the link.
func (u *unpacker) place(name string, make func(temp string) error) error {
	// Unique enough: whoever guesses it has the entry fail, and no more.
	temp := path.Join(path.Dir(name), ".atoll-"+rand.Text())
	err := make(temp)
	if err == nil {
		err = u.root.Rename(temp, name)
	}
	// Also after a move: one between two names of the same file does nothing.
	if rerr := u.root.Remove(temp); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = rerr
	}
	// The reason without the name, which means nothing to anybody.
	var known *fs.PathError
	if errors.As(err, &known) && path.Base(known.Path) == path.Base(temp) {
		return known.Err
	}
	var moved *os.LinkError
	if errors.As(err, &moved) {
		return moved.Err
	}
	return err
}

// parents makes the missing directories that lead to an entry.
func (u *unpacker) parents(dir string) error {
	if info, err := u.root.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	if parent := path.Dir(dir); parent != "." {
		if err := u.parents(parent); err != nil {
			return err
		}
	}
	if err := u.root.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return u.own(dir)
}

func (u *unpacker) directory(name string, mode fs.FileMode, mtime time.Time) error {
	if name != "." {
		if err := u.parents(name); err != nil {
			return err
		}
		if err := u.own(name); err != nil {
			return err
		}
	}
	if err := u.root.Chmod(name, mode); err != nil {
		return err
	}
	if len(u.dirs) < maxDirTimes {
		u.dirs = append(u.dirs, dirTime{name, mtime})
	}
	return nil
}

func (u *unpacker) file(name string, mode fs.FileMode, mtime time.Time, content io.Reader) error {
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, content, u.buf); err != nil {
		return err
	}
	if u.chown {
		if err := u.acct.ownFile(f); err != nil {
			return err
		}
	}
	// After chown, which clears setuid.
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return u.root.Chtimes(name, mtime, mtime)
}

func (u *unpacker) own(name string) error {
	if !u.chown {
		return nil
	}
	return u.root.Lchown(name, u.acct.uid, u.acct.gid)
}
