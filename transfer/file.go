package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// OpenImage opens a file as an image. The caller closes it.
func OpenImage(path string) (Image, io.Closer, error) {
	f, err := os.Open(path)
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
	return Image{f, info.Size()}, f, nil
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
	if res, err = Decode(ctx, r, base, f, o); err != nil {
		return res, err
	}
	if err := errors.Join(f.Truncate(res.Tree.Size()), f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return res, err
	}
	name := f.Name()
	f = nil
	if err := os.Rename(name, path); err != nil {
		return res, errors.Join(err, os.Remove(name))
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
