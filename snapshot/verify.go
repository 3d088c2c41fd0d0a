package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// stamp is what changes with a file's content, as far as that can be seen
// without reading it.
type stamp struct {
	size  int64
	inode uint64
	mtime time.Time
}

// settled is how old a file's last change must be before the next one is sure to
// have another time: the clock of file systems ticks every few milliseconds.
const settled = 100 * time.Millisecond

// isDamaged is the error of every call for a damaged snapshot; why may be nil.
func isDamaged(op, id, file string, why error) error {
	if why == nil {
		why = errors.New("it is not as it was saved")
	}
	return sandbox.Errorf(op, sandbox.Invalid, "", "snapshot %s is damaged: file %s: %w", id, file, why).
		WithHint("remove it; it cannot be restored")
}

// stamps looks at all files of a snapshot, which must have the sizes that the
// manifest says.
func stamps(op, dir string, m Manifest) ([]stamp, error) {
	out := make([]stamp, 0, len(m.Files))
	for _, f := range m.Files {
		info, err := os.Lstat(filepath.Join(dir, filepath.FromSlash(f.Name)))
		switch {
		case os.IsNotExist(err):
			return nil, isDamaged(op, m.ID, f.Name, errors.New("it is missing"))
		case err != nil:
			return nil, isDamaged(op, m.ID, f.Name, err)
		case info.Size() != f.Size:
			return nil, isDamaged(op, m.ID, f.Name, fmt.Errorf("it has %d bytes instead of %d", info.Size(), f.Size))
		}
		s := stamp{size: info.Size(), mtime: info.ModTime()}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			s.inode = st.Ino
		}
		out = append(out, s)
	}
	return out, nil
}

// Verify fails with Invalid unless a snapshot's files are as they were saved.
// The first call for a snapshot reads all of it and compares digests; later ones
// do so only when the size or the time of a file has changed. A file that was
// never hashed must look as it did when it was saved, as far as this process
// knows; after a restart only its size is known. Of files whose names match one of
// the patterns of checked (path.Match), which whoever reads them compares with
// digests of their own, only size and time are looked at.
func (s *Store) Verify(id string, checked ...string) error {
	const op = "snapshot.Verify"
	m, err := s.Usable(id)
	if err != nil {
		return err
	}
	now, err := stamps(op, s.Dir(id), m)
	if err != nil {
		return err
	}
	s.mu.RLock()
	known, seen := s.known[id]
	s.mu.RUnlock()
	if seen && slices.Equal(known, now) && !fresh(now, m) {
		return nil
	}
	for i, want := range m.Files {
		if slices.ContainsFunc(checked, func(pattern string) bool { ok, _ := path.Match(pattern, want.Name); return ok }) {
			continue
		}
		if want.Digest == "" {
			if seen && known[i] != now[i] {
				return isDamaged(op, id, want.Name, nil)
			}
			continue
		}
		got, err := digest(filepath.Join(s.Dir(id), filepath.FromSlash(want.Name)))
		if err != nil {
			return isDamaged(op, id, want.Name, err)
		}
		if got != want.Digest {
			return isDamaged(op, id, want.Name, nil)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[id] = now
	return nil
}

// fresh reports whether a hashed file changed so lately that its time may not
// tell of another change.
func fresh(now []stamp, m Manifest) bool {
	for i, s := range now {
		if m.Files[i].Digest != "" && time.Since(s.mtime) < settled {
			return true
		}
	}
	return false
}
