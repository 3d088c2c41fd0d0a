package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"

	"github.com/atoll-run/atoll/sandbox"
)

// arrivingName is a file in the directory of a snapshot that is lent: should the process end, the next one removes it all.
const arrivingName = "arriving"

// Lend makes a snapshot that came from elsewhere usable before all of it is there: Usable and Dir find it, and Verify looks at
// those files that whoever reads them does not check. It is not listed. CommitLent or Withdraw must follow.
func (d *Draft) Lend(m Manifest) error {
	const op = "snapshot.Lend"
	m.Format = formatVersion
	if m.ID != d.id {
		return sandbox.Errorf(op, sandbox.Invalid, d.id, "the manifest is of %s", m.ID)
	}
	d.store.mu.Lock()
	defer d.store.mu.Unlock()
	_, here := d.store.all[m.ID]
	_, lent := d.store.lent[m.ID]
	if here || lent {
		return sandbox.Errorf(op, sandbox.Exists, d.id, "the snapshot is here, or on its way")
	}
	err := writeSynced(filepath.Join(d.path, arrivingName), nil)
	if err == nil {
		err = syncDir(d.path)
	}
	final := filepath.Join(d.store.dir, m.ID)
	if err == nil {
		err = os.Rename(d.path, final)
	}
	if err != nil {
		return sandbox.E(op, diskKind(err), d.id, err)
	}
	d.path, d.Dir = final, filepath.Join(final, stateName)
	d.store.lent[m.ID] = m
	return nil
}

// Lent returns the manifests of snapshots that are lent.
func (s *Store) Lent() []Manifest {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []Manifest
	for _, m := range s.lent {
		out = append(out, m)
	}
	sortByAge(out)
	return out
}

// Usable returns the manifest of a snapshot that is here or lent. It fails as Get does.
func (s *Store) Usable(id string) (Manifest, error) {
	s.mu.RLock()
	m, ok := s.lent[id]
	s.mu.RUnlock()
	if ok {
		return m, nil
	}
	return s.Get(id)
}

// CommitLent makes a lent snapshot one like all others. It fails with Invalid unless its files are what its manifest says;
// then it is still lent. Files with the names of beside are not of the manifest, and stay.
func (d *Draft) CommitLent(beside ...string) error {
	const op = "snapshot.Receive"
	d.store.mu.RLock()
	m, ok := d.store.lent[d.id]
	d.store.mu.RUnlock()
	if !ok {
		return sandbox.Errorf(op, sandbox.NotFound, d.id, "it is not lent")
	}
	synced := make(chan error, 1)
	go func() { synced <- syncTree(d.Dir) }() // while they are compared
	files, err := listFiles(d.Dir, true)
	err = errors.Join(err, <-synced)
	files = slices.DeleteFunc(files, func(f File) bool { return slices.Contains(beside, f.Name) })
	if err == nil && !slices.Equal(files, m.Files) {
		return sandbox.Errorf(op, sandbox.Invalid, d.id, "what came is not what its manifest says")
	}
	if err == nil {
		err = d.writeManifest(m)
	}
	if err == nil { // from here on it is whole, whenever the process ends
		err = errors.Join(os.Remove(filepath.Join(d.path, arrivingName)), syncDir(d.path), syncDir(d.store.dir))
	}
	if err != nil {
		return sandbox.E(op, diskKind(err), d.id, err)
	}
	d.store.mu.Lock()
	defer d.store.mu.Unlock()
	delete(d.store.lent, d.id)
	d.store.all[d.id] = m
	return nil
}

// Withdraw removes a lent snapshot: the rest of it does not come.
func (d *Draft) Withdraw() error {
	d.store.mu.Lock()
	delete(d.store.lent, d.id)
	gone := filepath.Join(d.store.dir, gonePrefix+sandbox.NewID())
	err := os.Rename(d.path, gone)
	d.store.mu.Unlock()
	if err != nil {
		return sandbox.E("snapshot.Withdraw", sandbox.Internal, d.id, err)
	}
	return os.RemoveAll(gone)
}
