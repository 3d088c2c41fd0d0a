package chunk

import (
	"context"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/sandbox"
)

// DiskOptions configures a Disk. The zero value is good.
type DiskOptions struct {
	Limit int64 // bytes that all chunks may take; 0: as many as the disk has
	// Plan says how to pack a chunk's content; nil keeps it as it is.
	Plan func(data []byte) pack.Plan
}

// Disk is a Store in a directory of one process.
//
//	lock     held by the process that owns it
//	chunks/  by the first two digits of the name; each an envelope of package pack
//	refs/    one file each, its name escaped
//	tmp/     unfinished; removed by the next Open
//
// A chunk is written beside, synced, and renamed; its folder is synced before the next ref is set. So a power failure can
// lose chunks that no ref leads to, and nothing else.
type Disk struct {
	dir  string
	opts DiskOptions
	lock *os.File

	mu    sync.Mutex
	used  int64               // bytes of all chunks, those being written included
	dirty map[string]struct{} // folders whose entries may not have reached the disk
}

var _ Store = (*Disk)(nil)

// OpenDisk opens the store in dir, makes it if need be, and removes what an interrupted write left. It fails with Conflict
// when another process has it.
func OpenDisk(dir string, o DiskOptions) (*Disk, error) {
	const op = "chunk.OpenDisk"
	d := &Disk{dir: dir, opts: o, dirty: make(map[string]struct{})}
	for _, name := range []string{"chunks", "refs"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			return nil, sandbox.E(op, diskKind(err), dir, err)
		}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, sandbox.E(op, diskKind(err), dir, err)
	}
	d.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(sandbox.E(op, sandbox.Conflict, dir, err).WithHint("another process has this store"), lock.Close())
	}
	if err := errors.Join(os.RemoveAll(d.path("tmp")), os.Mkdir(d.path("tmp"), 0o700)); err != nil {
		return nil, errors.Join(sandbox.E(op, diskKind(err), dir, err), lock.Close())
	}
	if err := d.Each(context.Background(), func(e Entry) error {
		d.used += e.Size
		return nil
	}); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

// Close gives the store up.
func (d *Disk) Close() error { return d.lock.Close() }

// Used returns the bytes that all chunks take.
func (d *Disk) Used() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used
}

func (d *Disk) path(elem ...string) string {
	return filepath.Join(append([]string{d.dir}, elem...)...)
}

func (d *Disk) chunkPath(id ID) string {
	name := id.String()
	return d.path("chunks", name[:2], name[2:])
}

// Put implements Store.
func (d *Disk) Put(ctx context.Context, data []byte) (ID, error) {
	const op = "chunk.Put"
	if err := CheckSize(len(data)); err != nil {
		return ID{}, err
	}
	id := Sum(data)
	if err := ctx.Err(); err != nil {
		return ID{}, sandbox.E(op, "", id.String(), err)
	}
	path := d.chunkPath(id)
	if _, err := os.Lstat(path); err == nil {
		return id, nil
	}
	var plan pack.Plan
	if d.opts.Plan != nil {
		plan = d.opts.Plan(data)
	}
	envelope, err := pack.Append(nil, data, nil, plan)
	if err != nil {
		return ID{}, sandbox.E(op, sandbox.Internal, id.String(), err)
	}
	size := int64(len(envelope))
	if err := d.take(size); err != nil {
		return ID{}, err
	}
	fresh, err := d.write(path, envelope)
	if err != nil || !fresh {
		d.give(size)
	}
	if err != nil {
		return ID{}, sandbox.E(op, diskKind(err), id.String(), err)
	}
	return id, nil
}

// take reserves room.
func (d *Disk) take(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opts.Limit > 0 && d.used+size > d.opts.Limit {
		return sandbox.Errorf("chunk.Put", sandbox.Exhausted, d.dir, "the store is full: %d of %d bytes", d.used, d.opts.Limit)
	}
	d.used += size
	return nil
}

func (d *Disk) give(size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used -= size
}

// write makes a file appear whole; fresh is false when it was there already.
func (d *Disk) write(path string, content []byte) (fresh bool, err error) {
	f, err := os.CreateTemp(d.path("tmp"), "")
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name()) // does nothing once it was renamed; OpenDisk sweeps the rest
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return false, err
	}
	folder := filepath.Dir(path)
	if err := os.Mkdir(folder, 0o700); err == nil {
		d.markDirty(filepath.Dir(folder))
	} else if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	d.markDirty(folder) // before the rename: a ref that is set in between syncs once more
	d.mu.Lock()
	defer d.mu.Unlock() // two writers of one chunk are told apart here
	_, before := os.Lstat(path)
	if err := os.Rename(f.Name(), path); err != nil {
		return false, err
	}
	d.dirty[folder] = struct{}{}
	return errors.Is(before, fs.ErrNotExist), nil
}

func (d *Disk) markDirty(folder string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dirty[folder] = struct{}{}
}

// Get implements Store.
func (d *Disk) Get(ctx context.Context, id ID) ([]byte, error) {
	const op = "chunk.Get"
	if err := ctx.Err(); err != nil {
		return nil, sandbox.E(op, "", id.String(), err)
	}
	envelope, err := os.ReadFile(d.chunkPath(id))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, sandbox.Errorf(op, sandbox.NotFound, id.String(), "no such chunk")
	case err != nil:
		return nil, sandbox.E(op, sandbox.Internal, id.String(), err)
	}
	data, err := Open(envelope, id)
	if err != nil {
		return nil, errors.Join(err, d.Delete(ctx, id))
	}
	return data, nil
}

// Open opens an envelope and fails with Invalid unless it holds the chunk.
func Open(envelope []byte, id ID) ([]byte, error) {
	const op = "chunk.Get"
	data, err := pack.Open(envelope, nil, MaxSize)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, id.String(), err)
	}
	if got := Sum(data); got != id {
		return nil, sandbox.Errorf(op, sandbox.Invalid, id.String(), "the chunk is damaged: its content is %s", got)
	}
	return data, nil
}

// Missing implements Store.
func (d *Disk) Missing(ctx context.Context, ids []ID) ([]ID, error) {
	const op = "chunk.Missing"
	var missing []ID
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, sandbox.E(op, "", "", err)
		}
		if _, err := os.Lstat(d.chunkPath(id)); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, id)
		} else if err != nil {
			return nil, sandbox.E(op, sandbox.Internal, id.String(), err)
		}
	}
	return missing, nil
}

// Delete implements Store.
func (d *Disk) Delete(_ context.Context, id ID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	path := d.chunkPath(id)
	info, err := os.Lstat(path)
	if err == nil {
		err = os.Remove(path)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return sandbox.E("chunk.Delete", sandbox.Internal, id.String(), err)
	}
	d.used -= info.Size()
	return nil
}

// Each implements Store.
func (d *Disk) Each(ctx context.Context, fn func(Entry) error) error {
	const op = "chunk.Each"
	folders, err := os.ReadDir(d.path("chunks"))
	if err != nil {
		return sandbox.E(op, sandbox.Internal, d.dir, err)
	}
	for _, folder := range folders {
		files, err := os.ReadDir(d.path("chunks", folder.Name()))
		if err != nil {
			return sandbox.E(op, sandbox.Internal, d.dir, err)
		}
		for _, f := range files {
			if err := ctx.Err(); err != nil {
				return sandbox.E(op, "", d.dir, err)
			}
			id, err := ParseID(folder.Name() + f.Name())
			if err != nil {
				continue // not ours
			}
			info, err := f.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed since
			}
			if err != nil {
				return sandbox.E(op, sandbox.Internal, id.String(), err)
			}
			if err := fn(Entry{ID: id, Size: info.Size(), Written: info.ModTime()}); err != nil {
				return err
			}
		}
	}
	return nil
}

// SetRef implements Store.
func (d *Disk) SetRef(_ context.Context, name string, id ID) error {
	const op = "chunk.SetRef"
	if err := CheckRefName(name); err != nil {
		return err
	}
	d.mu.Lock()
	dirty := d.dirty
	d.dirty = make(map[string]struct{})
	d.mu.Unlock()
	for folder := range dirty {
		if err := syncDir(folder); err != nil {
			d.markDirty(folder)
			return sandbox.E(op, diskKind(err), name, err)
		}
	}
	f, err := os.CreateTemp(d.path("tmp"), "")
	if err != nil {
		return sandbox.E(op, diskKind(err), name, err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(id.String() + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), d.path("refs", url.PathEscape(name)))
	}
	if err == nil {
		err = syncDir(d.path("refs"))
	}
	if err != nil {
		return sandbox.E(op, diskKind(err), name, err)
	}
	return nil
}

// Ref implements Store.
func (d *Disk) Ref(_ context.Context, name string) (ID, error) {
	const op = "chunk.Ref"
	if err := CheckRefName(name); err != nil {
		return ID{}, err
	}
	text, err := os.ReadFile(d.path("refs", url.PathEscape(name)))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ID{}, sandbox.Errorf(op, sandbox.NotFound, name, "no such ref")
	case err != nil:
		return ID{}, sandbox.E(op, sandbox.Internal, name, err)
	}
	return ParseID(strings.TrimSpace(string(text)))
}

// Refs implements Store.
func (d *Disk) Refs(context.Context) (map[string]ID, error) {
	const op = "chunk.Refs"
	files, err := os.ReadDir(d.path("refs"))
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, d.dir, err)
	}
	refs := make(map[string]ID, len(files))
	for _, f := range files {
		name, err := url.PathUnescape(f.Name())
		if err != nil || CheckRefName(name) != nil {
			continue // not ours
		}
		text, err := os.ReadFile(d.path("refs", f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		var id ID
		if err == nil {
			id, err = ParseID(strings.TrimSpace(string(text)))
		}
		if err != nil {
			return nil, sandbox.E(op, sandbox.Internal, name, err) // better no answer than one that lets chunks go
		}
		refs[name] = id
	}
	return refs, nil
}

// DeleteRef implements Store.
func (d *Disk) DeleteRef(_ context.Context, name string) error {
	if err := CheckRefName(name); err != nil {
		return err
	}
	err := os.Remove(d.path("refs", url.PathEscape(name)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return sandbox.E("chunk.DeleteRef", sandbox.Internal, name, err)
	}
	return nil
}

// Grace implements Store: only the process that holds the lock writes.
func (d *Disk) Grace() time.Duration { return 0 }

func syncDir(path string) error {
	f, err := os.Open(path)
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
