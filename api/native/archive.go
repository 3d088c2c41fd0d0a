package native

import (
	"archive/tar"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// Pack writes a file, or a directory with all below it, into an archive. The
// source itself is called name there; with an empty name only what is in it is
// written. Sockets, pipes and devices are left out: they mean nothing elsewhere.
// report, which may be nil, is told each name and the bytes written so far.
func Pack(w *tar.Writer, source, name string, report func(name string, done int64)) error {
	var done int64
	return filepath.WalkDir(source, func(file string, d os.DirEntry, err error) error {
		if err != nil {
			if file != source && errors.Is(err, os.ErrNotExist) {
				return nil // removed meanwhile
			}
			return err
		}
		rel, err := filepath.Rel(source, file)
		if err != nil {
			return err
		}
		inside := path.Join(name, filepath.ToSlash(rel))
		if inside == "." {
			return nil
		}
		info, err := os.Lstat(file)
		if file == source {
			info, err = os.Stat(file) // the source may be a link to what is meant
		}
		if err != nil {
			return err
		}
		n, err := PackEntry(w, file, inside, info)
		done += n
		if report != nil {
			report(inside, done)
		}
		return err
	})
}

// PackEntry writes one entry and returns how many bytes of content it had.
func PackEntry(w *tar.Writer, file, name string, info os.FileInfo) (int64, error) {
	link := ""
	switch mode := info.Mode(); {
	case mode.IsDir():
		name += "/"
	case mode&os.ModeSymlink != 0:
		var err error
		if link, err = os.Readlink(file); err != nil {
			return 0, err
		}
	case !mode.IsRegular():
		return 0, nil
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return 0, err
	}
	header.Name, header.Format = name, tar.FormatPAX
	header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", "" // the sandbox has users of its own
	if !info.Mode().IsRegular() {
		return 0, w.WriteHeader(header)
	}
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := w.WriteHeader(header); err != nil {
		return 0, err
	}
	n, err := io.CopyN(w, f, header.Size)
	if errors.Is(err, io.EOF) {
		return n, sandbox.Errorf("native.Pack", sandbox.Conflict, file, "the file became shorter while it was read")
	}
	return n, err
}

// Unpack extracts an archive into dir, which is made when it is
// missing. name, if any, replaces the archive's root: its only file, or the
// directory "./". The archive is not trusted: os.Root keeps everything below dir,
// whatever links the archive may have planted before.
func Unpack(archive io.Reader, dir, name string) error {
	const op = "native.Unpack"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return sandbox.E(op, sandbox.Denied, dir, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return sandbox.E(op, sandbox.Denied, dir, err)
	}
	defer root.Close()
	var dirs []*tar.Header // their times are set last, as what is put in them changes these
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sandbox.E(op, "", dir, err)
		}
		h.Name = rename(h, name)
		if h.Name == "." && h.Typeflag == tar.TypeDir {
			continue
		}
		if !filepath.IsLocal(h.Name) {
			return sandbox.Errorf(op, sandbox.Invalid, h.Name, "the archive holds a name that leads out of the target")
		}
		if err := unpackOne(root, h, r); err != nil {
			return sandbox.E(op, "", filepath.Join(dir, h.Name), err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- { // deepest first
		h := dirs[i]
		if err := errors.Join(root.Chmod(h.Name, h.FileInfo().Mode().Perm()), root.Chtimes(h.Name, h.ModTime, h.ModTime)); err != nil {
			return sandbox.E(op, "", filepath.Join(dir, h.Name), err)
		}
	}
	return nil
}

// rename gives the name that an entry has below the target.
func rename(h *tar.Header, name string) string {
	inside, isTree := strings.CutPrefix(h.Name, "./")
	if !isTree && name != "" { // the archive is one file
		return name
	}
	return path.Clean(path.Join(name, inside)) // "." for the root itself
}

func unpackOne(root *os.Root, h *tar.Header, content io.Reader) error {
	if parent := path.Dir(h.Name); parent != "." {
		if err := root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		// Writable until all is in it; the true mode comes last.
		return root.MkdirAll(h.Name, 0o755)
	case tar.TypeSymlink:
		if err := root.Remove(h.Name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return root.Symlink(h.Linkname, h.Name)
	case tar.TypeReg:
		return UnpackFile(root, h, content)
	}
	return nil // devices and the like, which no sandbox of ours sends
}

// UnpackFile writes a file under another name and then renames it, so that no
// interruption leaves half a file where a whole one was.
func UnpackFile(root *os.Root, h *tar.Header, content io.Reader) error {
	temp := path.Join(path.Dir(h.Name), ".atoll-"+rand.Text())
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(h.FileInfo().Mode().Perm()), f.Close()); err == nil {
		err = root.Chtimes(temp, h.ModTime, h.ModTime)
	}
	if err == nil {
		err = root.Rename(temp, h.Name)
	}
	if err != nil {
		_ = root.Remove(temp)
	}
	return err
}
