package main

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

// unpack extracts an archive from a sandbox into dir, which is made when it is
// missing. name, if any, replaces the archive's root: its only file, or the
// directory "./". The archive is not trusted: os.Root keeps everything below dir,
// whatever links the archive may have planted before.
func unpack(archive io.Reader, dir, name string) error {
	const op = "atoll cp"
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
			return sandbox.Errorf(op, sandbox.Invalid, h.Name, "the sandbox sent a name that leads out of the target")
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
	return path.Join(name, inside)
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
		return unpackFile(root, h, content)
	}
	return nil // devices and the like, which no sandbox of ours sends
}

// unpackFile writes a file under another name and then renames it, so that no
// interruption leaves half a file where a whole one was.
func unpackFile(root *os.Root, h *tar.Header, content io.Reader) error {
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
