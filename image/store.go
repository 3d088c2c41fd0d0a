package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// Options configures a Store.
type Options struct {
	Log    *slog.Logger // nil: silent
	Limits Limits

	// Xattrs keeps extended attributes, file capabilities among them. It is off
	// by default since gVisor cannot open files that have any on EROFS.
	Xattrs bool
}

// Store keeps images in a directory. Any number of processes may use one
// directory at once, and a process may die at any moment: what is visible is
// always whole, and what it left unfinished is swept by the next Open.
//
//	lock    held shared while something is added, exclusive while something is removed
//	roots/  EROFS files and disks by BLAKE3 hash
//	sound/  how each root looked when it was last found to be what its name says
//	refs/   one record a name, by hash of the name
//	blobs/  layers and build results by SHA-256
//	partial/ layers half fetched, each locked by the process that fetches it
//	builds/ results of build steps by key
//	tmp/    unfinished work, each entry locked by the process that does it
type Store struct {
	dir  string
	opts Options
	log  *slog.Logger

	verifying sync.Mutex // held while a root is read to verify it
}

var folders = []string{"roots", "sound", "refs", "blobs", "partial", "builds", "tmp"}

// Open opens the store in dir and creates it when it is not there.
func Open(dir string, opts Options) (*Store, error) {
	const op = "image.Open"
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fail(op, dir, err)
	}
	s := &Store{dir: dir, opts: opts, log: opts.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	for _, name := range folders {
		if err := os.MkdirAll(s.path(name), 0o700); err != nil {
			return nil, fail(op, dir, err)
		}
	}
	if err := s.sweep(); err != nil {
		return nil, fail(op, dir, err)
	}
	return s, nil
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// lock takes the store's lock, how being LOCK_SH or LOCK_EX. It is held only
// for renames and removals, never for a transfer.
func (s *Store) lock(how int) (unlock func(), err error) {
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// openLocked opens a file, made if need be, and locks it for long-lasting work;
// closing it unlocks. It gives up when ctx ends.
func (s *Store) openLocked(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		err = flock(f, syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && samePlace(f, path) {
			return f, nil
		}
		if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// samePlace reports whether path still names the open file f, which another
// process may have moved or removed before we had the lock.
func samePlace(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// lockShared keeps things from being removed while one is added.
func (s *Store) lockShared() (unlock func(), err error) { return s.lock(syscall.LOCK_SH) }

func flock(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if err != syscall.EINTR {
			return err
		}
	}
}

// Get returns the image with a name, an ID, or the first characters of an ID.
// It fails with NotFound.
func (s *Store) Get(ref string) (Image, error) {
	const op = "image.Get"
	if ref == HostName {
		return host(), nil
	}
	r, err := s.readRecord(s.refPath(Familiar(ref)))
	if err == nil {
		return s.withNames(r)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return Image{}, fail(op, ref, err)
	}
	all, err := s.List()
	if err != nil {
		return Image{}, err
	}
	var found []Image
	for _, i := range all {
		if prefix := strings.TrimPrefix(ref, "sha256:"); len(prefix) >= 4 && strings.HasPrefix(i.ID, "sha256:"+prefix) {
			found = append(found, i)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return Image{}, sandbox.Errorf(op, sandbox.NotFound, ref, "no such image").
			WithHint("'atoll image ls' lists the images on this node, 'atoll image pull' fetches one from a registry")
	}
	return Image{}, sandbox.Errorf(op, sandbox.Invalid, ref, "%d images have IDs that begin so", len(found))
}

// withNames adds the other names of the same image.
func (s *Store) withNames(r Image) (Image, error) {
	all, err := s.List()
	if err != nil {
		return Image{}, err
	}
	for _, i := range all {
		if i.ID == r.ID {
			r.Names = i.Names
		}
	}
	return r, nil
}

// List returns all images but host, each once, by first name.
func (s *Store) List() ([]Image, error) {
	records, err := s.records()
	if err != nil {
		return nil, fail("image.List", s.dir, err)
	}
	byID := map[string]*Image{}
	var out []*Image
	for _, r := range records {
		if i := byID[r.ID]; i != nil {
			i.Names = append(i.Names, r.Names...)
			continue
		}
		byID[r.ID] = &r
		out = append(out, &r)
	}
	images := make([]Image, 0, len(out))
	for _, i := range out {
		slices.Sort(i.Names)
		images = append(images, *i)
	}
	slices.SortFunc(images, func(a, b Image) int { return strings.Compare(a.Names[0], b.Names[0]) })
	return images, nil
}

// records reads every record, one a name.
func (s *Store) records() ([]Image, error) {
	entries, err := os.ReadDir(s.path("refs"))
	if err != nil {
		return nil, err
	}
	var out []Image
	for _, e := range entries {
		r, err := s.readRecord(s.path("refs", e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// refPath is where the record of a name is. Names may hold any byte and be
// longer than file names, hence the hash.
func (s *Store) refPath(name string) string {
	sum := blake3.Sum256([]byte(name))
	return s.path("refs", fmt.Sprintf("%x.json", sum[:16]))
}

func (s *Store) readRecord(path string) (Image, error) {
	var i Image
	text, err := os.ReadFile(path)
	if err != nil {
		return i, err
	}
	if err := json.Unmarshal(text, &i); err != nil {
		return i, fmt.Errorf("%s: %w", path, err)
	}
	if len(i.Names) != 1 || i.Root.Kind != sandbox.RootEROFS && i.Root.Kind != sandbox.RootDisk {
		return i, fmt.Errorf("%s: not an image's record", path)
	}
	i.Root.Path = s.path("roots", rootFile(i.Root)) // the directory may have moved
	return i, nil
}

// Tag gives an image another name, taking it from the image that had it.
func (s *Store) Tag(ref, name string) (Image, error) {
	const op = "image.Tag"
	i, err := s.Get(ref)
	if err != nil {
		return Image{}, err
	}
	if i.Root.Kind == sandbox.RootHost {
		return Image{}, sandbox.Errorf(op, sandbox.Invalid, ref, "the host's image cannot have another name")
	}
	unlock, err := s.lockShared()
	if err != nil {
		return Image{}, fail(op, ref, err)
	}
	defer unlock()
	if _, err := os.Stat(i.Root.Path); err != nil {
		return Image{}, fail(op, ref, err)
	}
	return s.writeRef(op, i, name)
}

// writeRef records the image under a name. The caller holds the lock.
func (s *Store) writeRef(op string, i Image, name string) (Image, error) {
	name = Familiar(name)
	if err := checkName(name); err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, name, err)
	}
	i.Names = []string{name}
	text, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return Image{}, fail(op, name, err)
	}
	if err := s.writeFile(s.refPath(name), append(text, '\n')); err != nil {
		return Image{}, fail(op, name, err)
	}
	return i, nil
}

func checkName(name string) error {
	switch {
	case name == HostName || strings.HasPrefix(name, HostName+":"):
		return fmt.Errorf("the name %q belongs to the host's own system", HostName)
	case len(name) > 512:
		return fmt.Errorf("the name is longer than 512 bytes")
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c == 0x7f {
			return fmt.Errorf("the name holds spaces or control characters")
		}
	}
	if name == "" || strings.HasPrefix(name, ":") || strings.HasPrefix(name, "-") {
		return fmt.Errorf("not a name for an image")
	}
	return nil
}

// writeFile puts a file in place at once: after a crash it is there whole or
// not at all.
func (s *Store) writeFile(path string, content []byte) error {
	t, err := s.temp()
	if err != nil {
		return err
	}
	defer t.discard()
	if _, err := t.Write(content); err != nil {
		return err
	}
	return t.publish(path)
}

func (s *Store) rootPath(digest string) string {
	return s.path("roots", filepath.Base(rootName(digest)))
}

// rootFile is the name of the file in roots/ that holds a root.
func rootFile(root sandbox.Root) string {
	if root.Kind == sandbox.RootDisk {
		return filepath.Base(diskName(root.Digest))
	}
	return filepath.Base(rootName(root.Digest))
}

// mayTake fails with Exists when an image must not take a name from another: a
// name that an archive brought, which its user may not even know, and base, on
// which templates stand.
func (s *Store) mayTake(op, name string, i Image, given bool) error {
	name = Familiar(name)
	if given && name != Familiar(BaseName) {
		return nil
	}
	old, err := s.readRecord(s.refPath(name))
	if err != nil || old.ID == i.ID {
		return nil // the name is free, or unreadable and better replaced
	}
	return sandbox.Errorf(op, sandbox.Exists, name, "another image has this name").
		WithHint("give the new image another name; 'atoll image tag' can replace this one afterwards")
}

// addNames records an image under its names. The caller holds the lock.
func (s *Store) addNames(op string, i Image, names []string) (Image, error) {
	i.setID()
	for _, name := range names {
		if _, err := s.writeRef(op, i, name); err != nil {
			return Image{}, err
		}
		i.Names = append(i.Names, Familiar(name))
	}
	return i, nil
}

// takeNames is addNames for an image from elsewhere; see mayTake.
func (s *Store) takeNames(op string, i Image, names []string, given bool) (Image, error) {
	i.setID()
	for _, name := range names {
		if err := s.mayTake(op, name, i, given); err != nil {
			return Image{}, err
		}
	}
	return s.addNames(op, i, names)
}

// badArchive says that an archive's content is at fault, unless the host is.
func badArchive(subject string, err error) error {
	var errno syscall.Errno
	var known *sandbox.Err
	if errors.As(err, &errno) || errors.As(err, &known) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return sandbox.E("read archive", sandbox.Invalid, subject, err)
}

// fail wraps an error of the host or of an archive, giving it the kind that it
// deserves; one that has a kind keeps it.
func fail(op, subject string, err error) error {
	var known *sandbox.Err
	switch {
	case errors.As(err, &known):
		return sandbox.E(op, known.Kind, subject, err)
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return sandbox.E(op, sandbox.Exhausted, subject, err).WithHint("the disk of the image store is full: 'atoll image prune' frees what is unused")
	case errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM):
		return sandbox.E(op, sandbox.Denied, subject, err)
	}
	return sandbox.E(op, "", subject, err)
}
