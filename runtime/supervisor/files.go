package supervisor

import (
	"errors"
	"os"
)

// LinkFile makes dst the same file as src, which nobody changes, or a synced copy
// of it where that is not possible.
func LinkFile(dst, src string) error {
	if err := os.Link(src, dst); err == nil {
		return nil
	}
	return CopyFile(dst, src)
}

// CopyFile copies and syncs a file; file systems that can, share the blocks.
func CopyFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = out.ReadFrom(in)
	return errors.Join(err, out.Sync(), out.Close())
}

// WriteSynced writes a new file that survives a crash of the host, if the
// directory is synced after it.
func WriteSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// Sync syncs a file or directory.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
