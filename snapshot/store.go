package snapshot

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	manifestName = "manifest.json"
	stateName    = "state" // the directory that a runtime fills
	draftPrefix  = ".new-"
	gonePrefix   = ".gone-"
	maxManifest  = 4 << 20 // bytes; a manifest larger than this is damaged
)

// Store is a directory of snapshots. Only one process at a time may own it.
type Store struct {
	dir string

	mu      sync.RWMutex
	all     map[string]Manifest // by ID; what is on disk
	lent    map[string]Manifest // by ID; what is used before all of it is on disk
	damaged map[string]error    // by ID; why what is on disk cannot be used
	known   map[string][]stamp  // by ID; how the files looked when their content was right
}

// Open reads the store at dir, makes it if need be, and removes what an
// interrupted write or removal left. Snapshots that are damaged are left alone
// and returned as such, so that nothing is lost silently; Get tells why each
// cannot be used, and Remove removes it.
func Open(dir string) (s *Store, damaged []error, err error) {
	const op = "snapshot.Open"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, sandbox.E(op, sandbox.Internal, dir, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, sandbox.E(op, sandbox.Internal, dir, err)
	}
	s = &Store{dir: dir, all: make(map[string]Manifest), lent: make(map[string]Manifest), damaged: make(map[string]error), known: make(map[string][]stamp)}
	for _, e := range entries {
		name := e.Name()
		_, arriving := os.Lstat(filepath.Join(dir, name, arrivingName))
		if strings.HasPrefix(name, draftPrefix) || strings.HasPrefix(name, gonePrefix) || arriving == nil {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				damaged = append(damaged, err)
			}
			continue
		}
		m, err := s.read(name)
		if err != nil {
			s.damaged[name] = err
			damaged = append(damaged, err)
			continue
		}
		s.all[m.ID] = m
	}
	return s, damaged, nil
}

// read loads and checks a manifest: its identity, and that every file is there
// with its size.
func (s *Store) read(id string) (Manifest, error) {
	const op = "snapshot.read"
	f, err := os.Open(filepath.Join(s.dir, id, manifestName))
	if err != nil {
		return Manifest{}, isDamaged(op, id, manifestName, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return Manifest{}, sandbox.E(op, sandbox.Internal, id, err)
	}
	m, err := Decode(data)
	if err != nil {
		return Manifest{}, isDamaged(op, id, manifestName, err)
	}
	if m.ID != id {
		return Manifest{}, isDamaged(op, id, manifestName, fmt.Errorf("it is of snapshot %q", m.ID))
	}
	_, err = stamps(op, s.Dir(id), m)
	return m, err
}

// Decode reads a manifest and checks that it makes sense: the format is known,
// names stay within the snapshot, sizes are not negative.
func Decode(data []byte) (Manifest, error) {
	var m Manifest
	if len(data) > maxManifest {
		return m, fmt.Errorf("manifest is over %d bytes", maxManifest)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, err
	}
	if m.Format != formatVersion {
		return m, fmt.Errorf("manifest has format %d, this version reads %d", m.Format, formatVersion)
	}
	if !sandbox.ValidID(m.ID) {
		return m, fmt.Errorf("bad snapshot id %q", m.ID)
	}
	for _, f := range m.Files {
		if !filepath.IsLocal(filepath.FromSlash(f.Name)) || f.Size < 0 {
			return m, fmt.Errorf("bad file %q of %d bytes", f.Name, f.Size)
		}
	}
	return m, nil
}

// Draft is a snapshot in the making. A runtime fills Dir; then Commit or Abort
// ends it.
type Draft struct {
	Dir   string // empty, exists
	id    string
	path  string
	store *Store
}

// Begin starts a snapshot with a fresh ID.
func (s *Store) Begin() (*Draft, error) {
	id := sandbox.NewID()
	path := filepath.Join(s.dir, draftPrefix+id)
	d := &Draft{Dir: filepath.Join(path, stateName), id: id, path: path, store: s}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return nil, sandbox.E("snapshot.Begin", diskKind(err), id, err)
	}
	return d, nil
}

// ID is what the snapshot will be called.
func (d *Draft) ID() string { return d.id }

// Abort removes the draft.
func (d *Draft) Abort() error { return os.RemoveAll(d.path) }

// Commit makes the draft a snapshot. m's ID, Format and Files are filled in
// here; with hash, each file's digest too, which reads all of it. On an error
// the draft is removed.
func (d *Draft) Commit(m Manifest, hash bool) (Manifest, error) {
	const op = "snapshot.Commit"
	m.Format, m.ID = formatVersion, d.id
	var err error
	if m.Files, err = listFiles(d.Dir, hash); err == nil {
		err = d.publish(m)
	}
	if err != nil {
		_ = d.Abort() // the error that matters is err; Open sweeps what stays
		return Manifest{}, sandbox.E(op, diskKind(err), d.id, err)
	}
	now, err := stamps(op, d.store.Dir(m.ID), m)
	if err != nil {
		return Manifest{}, err
	}
	d.store.mu.Lock()
	d.store.all[m.ID] = m
	d.store.known[m.ID] = now
	d.store.mu.Unlock()
	return m, nil
}

func (d *Draft) publish(m Manifest) error {
	if err := d.writeManifest(m); err != nil {
		return err
	}
	if err := os.Rename(d.path, filepath.Join(d.store.dir, m.ID)); err != nil {
		return err
	}
	return syncDir(d.store.dir)
}

// writeManifest puts the manifest beside the state and has both on disk.
func (d *Draft) writeManifest(m Manifest) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(d.path, manifestName), data); err != nil {
		return err
	}
	for _, dir := range []string{d.Dir, d.path} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// Get returns a snapshot's manifest. It fails with NotFound, or Invalid when the
// snapshot is damaged.
func (s *Store) Get(id string) (Manifest, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m, ok := s.all[id]
	if err := s.damaged[id]; err != nil {
		return Manifest{}, err
	}
	if !ok {
		return Manifest{}, sandbox.Errorf("snapshot.Get", sandbox.NotFound, id, "no such snapshot")
	}
	return m, nil
}

// Dir is where a snapshot's state lies; a runtime restores from it.
func (s *Store) Dir(id string) string { return filepath.Join(s.dir, id, stateName) }

// List returns all snapshots, oldest first.
func (s *Store) List() []Manifest {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Manifest, 0, len(s.all))
	for _, m := range s.all {
		out = append(out, m)
	}
	sortByAge(out)
	return out
}

// Remove deletes a snapshot. Whether it is still in use is for the caller to know.
func (s *Store) Remove(id string) error {
	const op = "snapshot.Remove"
	s.mu.Lock()
	if _, ok := s.all[id]; !ok && s.damaged[id] == nil {
		s.mu.Unlock()
		return sandbox.Errorf(op, sandbox.NotFound, id, "no such snapshot")
	}
	gone := filepath.Join(s.dir, gonePrefix+id)
	err := os.Rename(filepath.Join(s.dir, id), gone)
	if err == nil {
		delete(s.all, id)
		delete(s.damaged, id)
		delete(s.known, id)
	}
	s.mu.Unlock()
	if err != nil {
		return sandbox.E(op, sandbox.Internal, id, err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return sandbox.E(op, sandbox.Internal, id, err)
	}
	return nil
}

// listFiles walks a state directory; the result is sorted by name, as WalkDir is.
func listFiles(dir string, hash bool) ([]File, error) {
	var files []File
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		f := File{Name: filepath.ToSlash(rel), Size: info.Size()}
		if hash {
			if f.Digest, err = digest(path); err != nil {
				return err
			}
		}
		files = append(files, f)
		return nil
	})
	return files, err
}

func digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := blake3.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return "blake3:" + hex.EncodeToString(h.Sum(nil)), nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// diskKind tells a full disk from other failures.
func diskKind(err error) sandbox.Kind {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return sandbox.Exhausted
	}
	return sandbox.Internal
}

func sortByAge(ms []Manifest) {
	slices.SortFunc(ms, func(a, b Manifest) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
}
