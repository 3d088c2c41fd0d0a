package image

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/atoll-run/atoll/sandbox"
)

// Remove takes a name away; given an ID it takes away every name of that image.
// The root stays until Prune. It fails with NotFound.
func (s *Store) Remove(ref string) error {
	const op = "image.Remove"
	i, err := s.Get(ref)
	if err != nil {
		return err
	}
	if i.Root.Kind == sandbox.RootHost {
		return sandbox.Errorf(op, sandbox.Invalid, ref, "the host's own system is not removed")
	}
	names := i.Names
	for _, name := range names {
		if name == Familiar(ref) {
			names = []string{name}
			break
		}
	}
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return fail(op, ref, err)
	}
	defer unlock()
	for _, name := range names {
		if err := os.Remove(s.refPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fail(op, ref, err)
		}
	}
	if err := syncDir(s.path("refs")); err != nil {
		return fail(op, ref, err)
	}
	return nil
}

// Pruned is what Prune removed.
type Pruned struct {
	Roots int   `json:"roots"`
	Blobs int   `json:"blobs"` // cached layers and results of build steps
	Bytes int64 `json:"bytes"`
}

// Prune removes roots that no image has and that are not in use, and layers
// that no image was made of. inUse holds the Root.Digest of every root that a
// sandbox or snapshot stands on. With builds it forgets the results of build
// steps too, which otherwise keep their roots.
func (s *Store) Prune(ctx context.Context, inUse []string, builds bool) (Pruned, error) {
	const op = "image.Prune"
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return Pruned{}, fail(op, s.dir, err)
	}
	defer unlock()
	var p Pruned
	if builds && s.building() {
		s.log.Info("a build is under way: results of build steps stay")
		builds = false
	}
	if builds {
		if err := p.removeAll(ctx, s.path("builds"), func(string) bool { return false }, &p.Blobs); err != nil {
			return p, fail(op, s.dir, err)
		}
	}
	keep := map[string]bool{}
	for _, digest := range inUse {
		keep[rootName(digest)], keep[diskName(digest)] = true, true
	}
	records, err := s.records()
	if err != nil {
		return p, fail(op, s.dir, err) // better nothing removed than something needed
	}
	for _, r := range records {
		keep[rootFile(r.Root)] = true
		for _, l := range r.Layers {
			keep[blobFile(l.Digest)] = true
		}
	}
	if err := s.keepBuilds(keep); err != nil {
		return p, fail(op, s.dir, err)
	}
	kept := func(name string) bool { return keep[name] }
	if err := p.removeAll(ctx, s.path("roots"), kept, &p.Roots); err != nil {
		return p, fail(op, s.dir, err)
	}
	var notes Pruned // not worth telling
	if err := notes.removeAll(ctx, s.path("sound"), kept, &notes.Roots); err != nil {
		return p, fail(op, s.dir, err)
	}
	if err := p.removeAll(ctx, s.path("blobs"), kept, &p.Blobs); err != nil {
		return p, fail(op, s.dir, err)
	}
	if err := p.removePartial(s.path("partial")); err != nil {
		return p, fail(op, s.dir, err)
	}
	return p, nil
}

// removePartial removes what is half fetched, but for what is being fetched now.
func (p *Pruned) removePartial(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := p.removeUnlocked(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pruned) removeUnlocked(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // finished since
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || flock(f, syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return err
	}
	p.Blobs++
	p.Bytes += allocated(info)
	return os.Remove(path)
}

// building reports whether a build is under way in any process.
func (s *Store) building() bool {
	unlock, err := s.lockBuilds(syscall.LOCK_EX | syscall.LOCK_NB)
	if err != nil {
		return true
	}
	unlock()
	return false
}

// keepBuilds adds what the results of build steps stand on.
func (s *Store) keepBuilds(keep map[string]bool) error {
	entries, err := os.ReadDir(s.path("builds"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		text, err := os.ReadFile(s.path("builds", e.Name()))
		if err != nil {
			return err
		}
		var r buildResult
		if err := json.Unmarshal(text, &r); err != nil {
			return err
		}
		keep[rootName(r.Root)] = true
		for _, l := range r.Layers {
			keep[blobFile(l)] = true
		}
	}
	return nil
}

// rootName, diskName and blobFile are the names of the files that hold them.
func rootName(digest string) string { return strings.TrimPrefix(digest, "blake3:") + ".erofs" }
func diskName(digest string) string { return strings.TrimPrefix(digest, "blake3:") + ".disk" }
func blobFile(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

func (p *Pruned) removeAll(ctx context.Context, dir string, keep func(name string) bool, count *int) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if keep(e.Name()) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
		*count++
		p.Bytes += allocated(info)
	}
	return syncDir(dir)
}

// allocated is the disk space of a file in bytes.
func allocated(info fs.FileInfo) int64 {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return stat.Blocks * 512
	}
	return info.Size()
}
