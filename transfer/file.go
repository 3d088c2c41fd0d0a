package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// OpenImage opens a regular file as an image. The caller closes it.
func OpenImage(path string) (Image, io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe that nobody writes to is refused, not waited for
	if err != nil {
		return Image{}, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrOption, path)
	}
	if err != nil {
		return Image{}, nil, errors.Join(err, f.Close())
	}
	return Image{newSparseFile(f, info.Size()), info.Size()}, f, nil
}

// written is a file whose pages go to the disk while more are written, so that syncing it at the end is short.
type written struct{ *os.File }

func (w written) WriteAt(p []byte, off int64) (int, error) {
	n, err := w.File.WriteAt(p, off)
	if n > 0 { // a hint: what is not on disk yet is when it is synced
		_ = unix.SyncFileRange(int(w.Fd()), off, int64(n), unix.SYNC_FILE_RANGE_WRITE)
	}
	return n, err
}

// DecodeFile rebuilds an image as the file path, which appears when all of it is verified and on disk, and not before;
// a file that was there is replaced. It is sparse where the image is zero.
func DecodeFile(ctx context.Context, r io.Reader, base Image, path string, o DecodeOptions) (res Result, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return res, err
	}
	defer func() {
		if f != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	o.Sparse = true
	if res, err = Decode(ctx, r, base, written{f}, o); err != nil {
		return res, err
	}
	err = errors.Join(f.Truncate(res.Tree.Size()), f.Chmod(0o644))
	if err == nil && !o.Unsynced {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return res, err
	}
	name := f.Name()
	f = nil
	if err := os.Rename(name, path); err != nil {
		return res, errors.Join(err, os.Remove(name))
	}
	if o.Unsynced {
		return res, nil
	}
	return res, syncDir(filepath.Dir(path))
}

// syncDir makes a rename in a directory last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	return nil
}
