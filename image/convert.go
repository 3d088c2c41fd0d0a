package image

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// conversion is what a root is made of.
type conversion struct {
	base    *sandbox.Root // nil for none
	layers  []*os.File    // lowest first
	ignore  []string      // paths of the layers to leave out
	workdir string        // made when it is missing, as Docker does when it starts a container; empty for none
}

// convert publishes a root and calls record, which must note who uses the root
// before a concurrent Prune may find it unused.
func (s *Store) convert(ctx context.Context, from conversion, record func(sandbox.Root, int64) error) error {
	u, err := newUnpacker(s.path("tmp"), s.opts.Limits, s.opts.Xattrs)
	if err != nil {
		return err
	}
	defer u.Close()
	if base := from.base; base != nil {
		f, err := os.Open(base.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if err := u.addEROFS(f, info.Size()); err != nil {
			return fmt.Errorf("root %s: %w", base.Digest, err)
		}
	}
	u.ignore = from.ignore
	for i, f := range from.layers {
		if err := u.addFile(ctx, f); err != nil {
			return badArchive(fmt.Sprintf("layer %d of %d", i+1, len(from.layers)), err)
		}
	}
	if err := u.tree.makeWorkdir(from.workdir); err != nil {
		return err
	}
	return s.publishRoot(u.tree, record)
}

// makeWorkdir makes the directory that an image's processes start in. Empty is none.
func (t *tree) makeWorkdir(name string) error {
	parts, err := splitPath(name)
	if err == nil {
		_, err = t.dir(parts, true)
	}
	if err != nil {
		return sandbox.Errorf("image", sandbox.Invalid, name, "the working directory of the image: %w", err)
	}
	return nil
}

// publishRoot writes the tree as a root; see convert for record, whose size is
// in bytes.
func (s *Store) publishRoot(t *tree, record func(sandbox.Root, int64) error) error {
	out, err := s.temp()
	if err != nil {
		return err
	}
	defer out.discard()
	size, err := writeEROFS(out, t)
	if err != nil {
		return err
	}
	hash := blake3.New()
	if _, err := io.CopyBuffer(hash, io.NewSectionReader(out, 0, size), make([]byte, 1<<20)); err != nil {
		return err
	}
	return s.publish(out, sandbox.Root{Kind: sandbox.RootEROFS, Digest: fmt.Sprintf("blake3:%x", hash.Sum(nil))}, size, record)
}

// publish gives the file of a root, of size bytes, its place; see convert for record.
func (s *Store) publish(out *temp, root sandbox.Root, size int64, record func(sandbox.Root, int64) error) error {
	root.Path = s.path("roots", rootFile(root))
	if err := out.Chmod(0o444); err != nil {
		return err
	}
	if err := out.Sync(); err != nil { // the long part, outside the lock
		return err
	}
	unlock, err := s.lockShared()
	if err != nil {
		return err
	}
	defer unlock()
	if info, err := os.Stat(root.Path); err != nil || info.Size() != size || s.VerifyRoot(root) != nil {
		if err := out.publish(root.Path); err != nil {
			return err
		}
		s.noteSound(rootFile(root))
	}
	return record(root, size)
}
