package carry

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/transfer"
)

// filler makes the file i of an offer at a path.
type filler func(ctx context.Context, i int, path string) error

// rebuild makes the files of an offer and commits them. fill is called once for each file that is not held: those of a
// snapshot's state in order, then the root.
func (c *Carrier) rebuild(ctx context.Context, s *session, fill filler) error {
	switch s.offer.Kind {
	case Image:
		return c.rebuildImage(ctx, s, fill)
	case Model:
		return c.rebuildModel(ctx, s, fill)
	}
	return c.rebuildSnapshot(ctx, s, fill)
}

// fillRoot returns how the root of a session is made; nil when it is here.
func (s *session) fillRoot(fill filler) func(context.Context, string) error {
	if s.terms[0].Held {
		return nil
	}
	return func(ctx context.Context, path string) error { return fill(ctx, 0, path) }
}

func (c *Carrier) rebuildImage(ctx context.Context, s *session, fill filler) error {
	i, err := s.offer.image()
	if err != nil {
		return err
	}
	return c.cfg.Images.Receive(ctx, i.Root.Digest, s.fillRoot(fill), func(root sandbox.Root) error {
		_, err := c.cfg.Images.Adopt(i, root)
		return err
	})
}

func (c *Carrier) rebuildSnapshot(ctx context.Context, s *session, fill filler) error {
	m, err := s.offer.snapshot()
	if err != nil {
		return err
	}
	d, err := c.cfg.Snapshots.Receive(m.ID)
	if err != nil {
		return err
	}
	for i := 1; i < len(s.offer.Files); i++ {
		if err := s.state(ctx, i, fill, d.Dir); err != nil {
			return errors.Join(err, d.Abort())
		}
	}
	committed := false
	err = c.cfg.Images.Receive(ctx, m.Spec.Root.Digest, s.fillRoot(fill), func(root sandbox.Root) error {
		local, err := node.Localize(m, root)
		if err == nil {
			committed = true // or aborted
			_, err = d.CommitReceived(local)
		}
		return err
	})
	if !committed {
		err = errors.Join(err, d.Abort())
	}
	return err
}

// state makes one file of a snapshot.
func (s *session) state(ctx context.Context, i int, fill filler, dir string) error {
	const op = "carry.Commit"
	f := s.offer.Files[i]
	path := filepath.Join(dir, filepath.FromSlash(f.Name[len(statePrefix):])) // snapshot.Decode has seen that it stays within
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fail(op, f.Name, diskKind(err), err)
	}
	if !s.terms[i].Held {
		return fill(ctx, i, path)
	}
	if err := link(s.here[i], path); err != nil {
		return fail(op, f.Name, diskKind(err), err)
	}
	return nil
}

// decode rebuilds a file from its delta. Its digest is compared where it is committed.
func (c *Carrier) decode(ctx context.Context, s *session, i int, delta io.Reader, path string) error {
	const op = "carry.Commit"
	f := s.offer.Files[i]
	var base transfer.Image
	if b := s.bases[i]; b != nil {
		info, err := b.Stat()
		if err != nil {
			return fail(op, f.Name, sandbox.Internal, err)
		}
		base = transfer.Image{At: b, Size: info.Size()}
	}
	// A snapshot is synced when it is committed; a root and weights stand by themselves.
	o := transfer.DecodeOptions{MaxSize: max(f.Size, 1), Unsynced: s.offer.Kind == Snapshot && f.Name != rootName}
	if b := s.terms[i].Base; b != nil {
		o.Base = c.known.tree(*b)
	}
	res, err := transfer.DecodeFile(ctx, delta, base, path, o)
	if err == nil {
		if n, _ := io.Copy(io.Discard, delta); n > 0 {
			err = transfer.ErrCorrupt
		}
	}
	if err != nil {
		return fail(op, f.Name, diskKind(err), err)
	}
	s.trees[i] = res.Tree
	return nil
}

// diskKind tells a full disk, and what is wrong with a delta, from other failures.
func diskKind(err error) sandbox.Kind {
	switch {
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return sandbox.Exhausted
	case errors.Is(err, transfer.ErrCorrupt), errors.Is(err, transfer.ErrTruncated), errors.Is(err, transfer.ErrVersion),
		errors.Is(err, transfer.ErrTooLarge), errors.Is(err, transfer.ErrWrongBase):
		return sandbox.Invalid
	}
	return sandbox.Internal
}

// link makes dst the same file as src, which nobody changes, or a copy of it where that is not possible.
func link(src, dst string) error {
	if os.Link(src, dst) == nil {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
