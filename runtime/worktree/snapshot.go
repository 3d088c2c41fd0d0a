package worktree

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/layer"
	"github.com/atoll-run/atoll/sandbox"
)

// A snapshot is the commit that the sandbox stands on and an archive of each of
// its directories: what it changed, committed or not, tracked or ignored. The
// commit itself stays in the repository.
type manifest struct {
	Format int               // 1
	ID     string            // of the sandbox
	Base   string            // commit
	Branch string            // that its work is published as
	SHA256 map[string]string // of each archive, by file name
}

const (
	manifestName   = "snapshot.json" // written last
	manifestFormat = 1
)

// part is a directory of a sandbox as it stands in a snapshot.
type part struct {
	dir, file string
	o         layer.Options
}

// parts are what a snapshot consists of.
func (b *box) parts() []part {
	owner := &layer.Owner{UID: b.rec.UID, GID: b.rec.GID}
	return []part{
		{layersName + "/upper", "upper.tar", layer.Options{Overlay: true, UserXattr: true, Owner: owner}},
		{gitName, "git.tar", layer.Options{Owner: owner}},
		{homeName, "home.tar", layer.Options{Owner: owner}},
		{tempName, "tmp.tar", layer.Options{Owner: owner}},
	}
}

// Snapshot implements sandbox.Runtime. Processes and memory are not in it.
func (r *Runtime) Snapshot(ctx context.Context, id, dir string, opts sandbox.SnapshotOptions) error {
	const op = "worktree.Snapshot"
	b, err := r.find(ctx, op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.unlock()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return sandbox.Errorf(op, sandbox.Invalid, id, "%s is not an empty directory", dir)
	}
	if err := b.still(ctx, func() error { return b.save(ctx, dir) }); err != nil {
		return sandbox.E(op, kindOf(err), id, err)
	}
	if !opts.Stop {
		return nil
	}
	b.unpin(context.WithoutCancel(ctx))
	if err := b.remove(); err != nil {
		return sandbox.E(op, sandbox.Internal, id, err)
	}
	return nil
}

// save writes a snapshot.
func (b *box) save(ctx context.Context, dir string) error {
	m := manifest{Format: manifestFormat, ID: b.id, Base: b.rec.Base, Branch: b.rec.Branch, SHA256: map[string]string{}}
	for _, p := range b.parts() {
		sum, err := archive(ctx, b.path(p.dir), filepath.Join(dir, p.file), p.o)
		if err != nil {
			return err
		}
		m.SHA256[p.file] = sum
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return writeSynced(filepath.Join(dir, manifestName), func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

// archive writes a tree into a file and returns its hash.
func archive(ctx context.Context, tree, file string, o layer.Options) (string, error) {
	sum := sha256.New()
	err := writeSynced(file, func(w io.Writer) error {
		return layer.Write(ctx, io.MultiWriter(w, sum), tree, o)
	})
	return hex.EncodeToString(sum.Sum(nil)), err
}

// writeSynced writes a file so that it survives a power failure.
func writeSynced(file string, write func(io.Writer) error) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Restore implements sandbox.Runtime. The repository must have the commit that
// the snapshot stands on. Setup does not run again: what it made is in there.
func (r *Runtime) Restore(ctx context.Context, spec sandbox.Spec, dir string) error {
	const op = "worktree.Restore"
	return r.make(ctx, op, spec, func(b *box) error {
		m, err := loadManifest(dir)
		if err != nil {
			return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "%s holds no snapshot: %w", dir, err)
		}
		repo, err := openRepository(ctx, op, spec.Root.Path)
		if err != nil {
			return err
		}
		if b.rec.Base, err = repo.resolve(ctx, op, m.Base); err != nil {
			return err
		}
		if err := b.prepare(ctx, op, repo, m.branchFor(spec)); err != nil {
			return err
		}
		if err := b.load(ctx, dir, m); err != nil {
			return sandbox.E(op, kindOf(err), spec.ID, err)
		}
		return repo.pin(ctx, r.ref+b.id, b.rec.Base)
	})
}

// branchFor returns the branch that the work of a restored sandbox is published
// as. A fork has one of its own, so that it does not meet its siblings there;
// inside, the branch that was checked out still is.
func (m manifest) branchFor(spec sandbox.Spec) string {
	own := spec.Labels[LabelBranch]
	switch {
	case spec.ID == m.ID || own != "" && own != m.Branch:
		return own
	case own == "":
		return "" // the default names the sandbox
	}
	return own + "-" + spec.ID[:min(8, len(spec.ID))]
}

// maxManifest bounds a manifest in bytes.
const maxManifest = 1 << 20

func loadManifest(dir string) (manifest, error) {
	f, err := os.Open(filepath.Join(dir, manifestName))
	if err != nil {
		return manifest{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return manifest{}, err
	}
	return parseManifest(text)
}

// parseManifest reads a manifest, which may come from another node.
func parseManifest(text []byte) (m manifest, err error) {
	if err := json.Unmarshal(text, &m); err != nil {
		return m, err
	}
	if m.Format != manifestFormat || !sandbox.ValidID(m.ID) || !isObjectName(m.Base) || !validBranch(m.Branch) {
		return m, fmt.Errorf("format %d, base %q, branch %q are not those of a snapshot of ours", m.Format, m.Base, m.Branch)
	}
	return m, nil
}

// errDamaged is returned for an archive that is not as it was written.
var errDamaged = errors.New("the snapshot is damaged")

// load lays out the files of a snapshot.
func (b *box) load(ctx context.Context, dir string, m manifest) error {
	if err := errors.Join(b.makeDirs(), os.Mkdir(b.path(gitName), 0o755)); err != nil {
		return err
	}
	if err := b.giveAway(); err != nil {
		return err
	}
	for _, p := range b.parts() {
		if err := unarchive(ctx, filepath.Join(dir, p.file), b.path(p.dir), m.SHA256[p.file], p.o); err != nil {
			return fmt.Errorf("%s: %w", p.file, err)
		}
	}
	return b.relinkObjects()
}

// relinkObjects makes the git directory borrow from the repository as it is on
// this host, where it may have other alternates than where the snapshot was taken.
func (b *box) relinkObjects() error {
	git, err := os.OpenRoot(b.path(gitName))
	if err != nil {
		return err
	}
	defer git.Close()
	var text []byte
	for i := range b.rec.Objects {
		text = fmt.Appendf(text, "%s%d\n", objectsDir, i)
	}
	const name = "objects/info/alternates"
	if err := git.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := git.RemoveAll(name); err != nil {
		return err
	}
	// Whoever held the index is not running any more.
	if err := git.RemoveAll("index.lock"); err != nil {
		return err
	}
	return git.WriteFile(name, text, 0o644)
}

// unarchive lays a tree out of a file whose hash is known.
func unarchive(ctx context.Context, file, tree, want string, o layer.Options) error {
	f, err := os.Open(file)
	if err != nil {
		return errors.Join(errDamaged, err)
	}
	defer f.Close()
	sum := sha256.New()
	r := io.TeeReader(f, sum)
	err = layer.Extract(ctx, r, tree, o)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != want {
		return errDamaged
	}
	return nil
}

// Changes implements sandbox.Runtime: the working tree without its git
// directory, and the home.
func (r *Runtime) Changes(ctx context.Context, id string, w io.Writer) error {
	const op = "worktree.Changes"
	b, err := r.find(ctx, op, id, sandbox.Running, sandbox.Paused, sandbox.Error)
	if err != nil {
		return err
	}
	defer b.unlock()
	upper := layer.Options{Overlay: true, UserXattr: true, Prefix: "work", Skip: func(rel string) bool { return rel == ".git" }}
	err = layer.WriteTrees(ctx, w,
		layer.Tree{Dir: b.path(layersName + "/upper"), Options: upper},
		layer.Tree{Dir: b.path(homeName), Options: layer.Options{Prefix: homeDir[1:]}})
	if err != nil {
		return sandbox.E(op, kindOf(err), id, err)
	}
	return nil
}

// kindOf finds what kind of error a layer gave.
func kindOf(err error) sandbox.Kind {
	switch {
	case slices.ContainsFunc([]error{errDamaged, layer.ErrMalformed}, func(e error) bool { return errors.Is(err, e) }):
		return sandbox.Invalid
	case errors.Is(err, layer.ErrTooBig), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return sandbox.Exhausted
	}
	return ""
}
