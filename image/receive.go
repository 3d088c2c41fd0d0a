package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/sandbox"
)

// Receive takes in the root with a digest, which came from elsewhere, and records what stands on it before it could be
// removed again. fill writes it to a path, whose content is compared with the digest; nil fill means that the root is here
// already, and fails with NotFound when it is not.
func (s *Store) Receive(ctx context.Context, digest string, fill func(ctx context.Context, path string) error, record func(sandbox.Root) error) error {
	const op = "image.Receive"
	root := sandbox.Root{Kind: sandbox.RootEROFS, Path: s.rootPath(digest), Digest: digest}
	filled := ""
	if fill != nil {
		dir, remove, err := s.tempDir()
		if err != nil {
			return fail(op, digest, err)
		}
		defer remove()
		filled = filepath.Join(dir, "root")
		if err := fill(ctx, filled); err != nil {
			return fail(op, digest, err)
		}
		got, err := hashFile(filled)
		if err != nil {
			return fail(op, digest, err)
		}
		if got != digest {
			return sandbox.Errorf(op, sandbox.Invalid, digest, "what came is %s", got)
		}
		if err := os.Chmod(filled, 0o444); err != nil {
			return fail(op, digest, err)
		}
	}
	unlock, err := s.lockShared()
	if err != nil {
		return fail(op, digest, err)
	}
	defer unlock()
	if !s.Holds(digest) {
		if fill == nil {
			return sandbox.Errorf(op, sandbox.NotFound, digest, "the root is not here")
		}
		if err := errors.Join(os.Rename(filled, root.Path), syncDir(s.path("roots"))); err != nil {
			return fail(op, digest, err)
		}
		s.noteSound(rootName(digest))
	}
	return record(root)
}

// Holds reports whether the root with a digest is here and sound.
func (s *Store) Holds(digest string) bool {
	root := sandbox.Root{Kind: sandbox.RootEROFS, Path: s.rootPath(digest), Digest: digest}
	if _, err := os.Stat(root.Path); err != nil {
		return false
	}
	return s.VerifyRoot(root) == nil
}

// Adopt records an image that came from elsewhere under its names. Its root is here: it is called by Receive's record.
func (s *Store) Adopt(i Image, root sandbox.Root) (Image, error) {
	names := i.Names
	i.Root, i.Names = root, nil
	return s.addNames("image.Receive", i, names)
}
