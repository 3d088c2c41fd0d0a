package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// temp is an unfinished file of the store. Its lock, which the kernel drops
// when the process dies, tells sweepers that somebody is still at work.
type temp struct {
	*os.File
	done bool
}

// temp makes an unfinished file; the caller must discard it in the end, which
// does nothing to a published one.
func (s *Store) temp() (*temp, error) {
	unlock, err := s.lockShared() // no sweep between creation and lock
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := os.CreateTemp(s.path("tmp"), "file-")
	if err != nil {
		return nil, err
	}
	t := &temp{File: f}
	if err := flock(f, syscall.LOCK_EX); err != nil {
		t.discard()
		return nil, err
	}
	return t, nil
}

// publish syncs the file and gives it its place, replacing what was there.
func (t *temp) publish(path string) error {
	if err := t.Sync(); err != nil {
		return err
	}
	if err := os.Rename(t.Name(), path); err != nil {
		return err
	}
	t.done = true
	if err := t.Close(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// discard closes the file and removes it unless it was published.
func (t *temp) discard() {
	if t.done {
		return
	}
	_ = os.Remove(t.Name())
	_ = t.Close()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// tempDir makes a directory for unfinished work. The caller must call remove.
func (s *Store) tempDir() (path string, remove func(), err error) {
	unlock, err := s.lockShared()
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	path, err = os.MkdirTemp(s.path("tmp"), "dir-")
	if err != nil {
		return "", nil, err
	}
	d, err := os.Open(path)
	if err == nil {
		err = flock(d, syscall.LOCK_EX)
	}
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(path))
	}
	return path, func() {
		if err := os.RemoveAll(path); err != nil {
			s.log.Warn("temporary directory left for the next sweep", "path", path, "err", err)
		}
		_ = d.Close()
	}, nil
}

// sweep removes what dead processes left unfinished.
func (s *Store) sweep() error {
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := sweepOne(s.path("tmp", e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func sweepOne(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // finished since
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(f, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil // somebody works on it
	}
	return os.RemoveAll(path)
}
