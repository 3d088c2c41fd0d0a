package gvisor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// entry is one file, directory or link of an image that we make ourselves.
type entry struct {
	name     string // absolute, clean
	mode     fs.FileMode
	uid, gid int
	link     string // target of a symbolic link
	data     []byte // content of a file
}

// makeImage returns the path of an EROFS image in dir with the entries, parents
// before children. It is named after them and built if it is missing. It appears
// whole or not at all. Older images stay: running sandboxes use them.
func makeImage(dir string, entries []entry) (string, error) {
	hash := blake3.New()
	for _, e := range entries {
		fmt.Fprintf(hash, "%q %o %d %d %q %d\n", e.name, e.mode, e.uid, e.gid, e.link, len(e.data))
		_, _ = hash.Write(e.data)
	}
	path := filepath.Join(dir, hex.EncodeToString(hash.Sum(nil)[:16])+imageSuffix)
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	tmp, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	w := erofs.Create(tmp, erofs.WithBlockSize(4096), erofs.WithBuildTime(0, 0), erofs.WithTempDir(dir))
	for _, e := range entries {
		if err := e.write(w); err != nil {
			return "", fmt.Errorf("add %s to an image: %w", e.name, err)
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	if err := tmp.Sync(); err != nil {
		return "", err
	}
	return path, os.Rename(tmp.Name(), path)
}

const imageSuffix = ".erofs"

// write adds the entry to an image.
func (e entry) write(w *erofs.Writer) error {
	switch {
	case e.mode.IsDir():
		if err := w.Mkdir(e.name, e.mode); err != nil {
			return err
		}
	case e.mode&fs.ModeSymlink != 0:
		if err := w.Symlink(e.link, e.name); err != nil {
			return err
		}
	default:
		f, err := w.Create(e.name)
		if err != nil {
			return err
		}
		if _, err := f.Write(e.data); err != nil {
			return err
		}
		if err := errors.Join(f.Chmod(e.mode), f.Close()); err != nil {
			return err
		}
	}
	return errors.Join(w.Chown(e.name, e.uid, e.gid), w.Chtimes(e.name, time.Unix(0, 0), time.Unix(0, 0)))
}

// makeAgentImage puts the guest agent into an image as its one file, "guest".
func makeAgentImage(dir, guest string) (string, error) {
	data, err := os.ReadFile(guest)
	if err != nil {
		return "", sandbox.E("gvisor.New", sandbox.Invalid, guest, err).WithHint("Config.Guest must be the path of the guest agent")
	}
	return makeImage(dir, []entry{
		{name: "/", mode: fs.ModeDir | 0o755},
		{name: "/guest", mode: 0o755, data: data},
	})
}
