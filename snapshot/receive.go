package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/atoll-run/atoll/sandbox"
)

// Receive starts a snapshot that came from elsewhere and keeps its ID. It fails with Exists when it is here.
func (s *Store) Receive(id string) (*Draft, error) {
	const op = "snapshot.Receive"
	if !sandbox.ValidID(id) {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "bad snapshot id %.80q", id)
	}
	if _, err := s.Get(id); err == nil {
		return nil, sandbox.Errorf(op, sandbox.Exists, id, "the snapshot is here")
	}
	path := filepath.Join(s.dir, draftPrefix+sandbox.NewID()) // two may come at once
	d := &Draft{Dir: filepath.Join(path, stateName), id: id, path: path, store: s}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return nil, sandbox.E(op, diskKind(err), id, err)
	}
	return d, nil
}

// CommitReceived makes the draft the snapshot that m describes. It fails with Invalid unless the draft's files are those of
// m, by names, sizes and digests, and with Exists when it came another way meanwhile. On an error the draft is removed.
func (d *Draft) CommitReceived(m Manifest) (Manifest, error) {
	const op = "snapshot.Receive"
	synced := make(chan error, 1)
	go func() { synced <- syncTree(d.Dir) }() // while they are compared
	files, err := listFiles(d.Dir, true)
	err = errors.Join(err, <-synced)
	if err == nil && (m.ID != d.id || !slices.Equal(files, m.Files)) {
		err = sandbox.Errorf(op, sandbox.Invalid, d.id, "what came is not what its manifest says")
	}
	if err == nil {
		m.Format = formatVersion
		d.store.mu.Lock()
		defer d.store.mu.Unlock()
		_, here := d.store.all[m.ID]
		_, lent := d.store.lent[m.ID]
		if here || lent {
			err = sandbox.Errorf(op, sandbox.Exists, d.id, "the snapshot is here, or on its way")
		} else if err = d.publish(m); err == nil {
			d.store.all[m.ID] = m
			if now, err := stamps(op, d.store.Dir(m.ID), m); err == nil { // else Verify reads it once more, and says what is wrong
				d.store.known[m.ID] = now
			}
			return m, nil
		}
	}
	_ = d.Abort() // the error that matters is err; Open sweeps what stays
	if sandbox.KindOf(err) == sandbox.Internal {
		err = sandbox.E(op, diskKind(err), d.id, err)
	}
	return Manifest{}, err
}

// syncTree sees to it that all files and folders below dir are on disk: all at once, so that the disk writes its journal for
// several at a time.
func syncTree(dir string) error {
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	var mu sync.Mutex
	var errs []error
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() && !e.IsDir() {
			return err
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := syncDir(path); err != nil { // a file is synced as a folder is
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
		return nil
	})
	wg.Wait()
	return errors.Join(append(errs, err)...)
}
