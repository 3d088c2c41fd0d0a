package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// copy carries out OpCopy and OpAdd. The layer that it makes is decided by what
// is copied and where to; times do not count for the cache.
func (b *build) copy(ctx context.Context, n int, st *state, step Step) (cached bool, err error) {
	if len(step.Args) < 2 {
		return false, invalid("%s wants at least one source and a destination", step.Op)
	}
	source, closeSource, err := b.source(ctx, n, step)
	if err != nil {
		return false, err
	}
	defer closeSource()
	there, closeThere, err := b.tree(ctx, st)
	if err != nil {
		return false, err
	}
	defer closeThere()
	c := &copier{there: there, layer: newTree(), from: source, keepOwners: step.From != ""}
	defer c.close()
	if err := c.options(step); err != nil {
		return false, err
	}
	if err := c.copyAll(ctx, b, st, step); err != nil {
		return false, err
	}
	hash, err := c.layer.contentHash()
	if err != nil {
		return false, err
	}
	st.key = hashOf(st.key, hash)
	return b.addLayer(st, c.layer, c.implied)
}

// addLayer puts a layer made of a tree on top of st, unless it is known.
func (b *build) addLayer(st *state, t *tree, implied map[string]bool) (cached bool, err error) {
	if b.recall(st) {
		return true, nil
	}
	digest, _, err := b.saveLayer(st, st.layers, func(w io.Writer) error { return writeTar(w, t, implied) })
	if err != nil {
		return false, err
	}
	st.layers = append(slices.Clone(st.layers), digest)
	return false, nil
}

// workdir carries out OpWorkdir: the directory is made when it is missing.
func (b *build) workdir(ctx context.Context, st *state, step Step) (cached bool, err error) {
	st.config.WorkingDir = st.dir(step.Args[0])
	there, closeThere, err := b.tree(ctx, st)
	if err != nil {
		return false, err
	}
	defer closeThere()
	c := &copier{there: there, layer: newTree()}
	if err := c.options(step); err != nil {
		return false, err
	}
	parts, err := splitPath(st.config.WorkingDir)
	if err != nil {
		return false, sandbox.E("build", sandbox.Invalid, "", err)
	}
	found, err := there.dir(parts, false)
	if err != nil {
		return false, sandbox.E("build", sandbox.Invalid, st.config.WorkingDir, err)
	}
	if found != nil {
		return true, nil
	}
	if err := c.makeDirs(st.config.WorkingDir); err != nil {
		return false, err
	}
	return b.addLayer(st, c.layer, c.implied)
}

// source returns the tree that a step copies from.
func (b *build) source(ctx context.Context, n int, step Step) (t *tree, closer func(), err error) {
	switch {
	case step.Archive != "":
		return b.archive(ctx, step.Archive)
	case step.From != "":
		if stage := b.findStage(step.From, n); stage >= 0 {
			st, err := b.stage(ctx, stage)
			if err != nil {
				return nil, nil, err
			}
			return b.tree(ctx, st)
		}
		i, err := b.req.Base(ctx, step.From)
		if err != nil {
			return nil, nil, err
		}
		if i.Root.Kind != sandbox.RootEROFS {
			return nil, nil, unsupported("nothing can be copied from the host's own system or from a disk image")
		}
		return b.tree(ctx, &state{root: i.Root})
	case b.req.Context == "":
		return nil, nil, invalid("there is no directory to copy from")
	}
	if b.context == nil {
		if b.context, err = openContext(b.req.Context); err != nil {
			return nil, nil, err
		}
	}
	return b.context.tree, func() {}, nil
}

// archive reads a tar archive on the host, plain or compressed.
func (b *build) archive(ctx context.Context, name string) (t *tree, closer func(), err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	u, err := newUnpacker(b.store.path("tmp"), b.store.opts.Limits, false)
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	closer = func() { _, _ = f.Close(), u.Close() }
	if err := u.addFile(ctx, f); err != nil {
		closer()
		return nil, nil, badArchive(path.Base(name), err)
	}
	return u.tree, closer, nil
}

// copier makes the layer of one step.
type copier struct {
	there      *tree // what is there already
	from       *tree
	layer      *tree
	implied    map[string]bool // directories on the way in layer that are there already
	keepOwners bool
	owner      bool // uid and gid below were asked for
	uid, gid   uint32
	chmod      int // -1: as it is
	unpacked   []*unpacker
}

func (c *copier) close() {
	for _, u := range c.unpacked {
		_ = u.Close()
	}
}

func (c *copier) options(step Step) error {
	c.implied = map[string]bool{"/": true}
	c.chmod = -1
	if step.Chmod != "" {
		mode, err := strconv.ParseUint(step.Chmod, 8, 12)
		if err != nil {
			return invalid("%q is not an octal mode", step.Chmod)
		}
		c.chmod = int(mode)
	}
	if step.Chown == "" {
		return nil
	}
	var err error
	c.owner = true
	c.uid, c.gid, err = c.there.owner(step.Chown)
	return err
}

// copyAll copies all sources of a step.
func (c *copier) copyAll(ctx context.Context, b *build, st *state, step Step) error {
	last := len(step.Args) - 1
	given := step.Args[last]
	dest := st.dir(given)
	var found []string
	for _, source := range step.Args[:last] {
		names, err := c.from.matches(source)
		if err != nil {
			return sandbox.E("build", sandbox.Invalid, "", err)
		}
		found = append(found, names...)
	}
	intoDir := strings.HasSuffix(given, "/") || given == "." || strings.HasSuffix(given, "/.") || c.there.isDir(dest)
	if len(found) > 1 && !intoDir {
		return invalid("several files are copied to %q, which must then end with a slash", given)
	}
	for _, name := range found {
		n, err := c.from.follow(name)
		if err != nil {
			return sandbox.E("build", sandbox.Invalid, "", err)
		}
		switch {
		case n.isDir():
			err = c.copyDir(n, dest)
		case step.Op == OpAdd && n.data != nil && looksLikeArchive(n.data):
			err = c.unpack(ctx, b, n.data, dest)
		case intoDir:
			err = c.copyFile(n, dest, path.Base(name))
		default:
			err = c.copyFile(n, path.Dir(dest), path.Base(dest))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// copyDir copies what is in a directory.
func (c *copier) copyDir(n *inode, dest string) error {
	if err := c.makeDirs(dest); err != nil {
		return err
	}
	return c.copyChildren(n, dest, map[*inode]*inode{})
}

func (c *copier) copyChildren(n *inode, dest string, seen map[*inode]*inode) error {
	for _, name := range n.names() {
		child, full := n.children[name], path.Join(dest, name)
		if err := c.put(full, child, seen); err != nil {
			return err
		}
		if child.isDir() {
			if err := c.copyChildren(child, full, seen); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *copier) copyFile(n *inode, dir, base string) error {
	if err := c.makeDirs(dir); err != nil {
		return err
	}
	return c.put(path.Join(dir, base), n, map[*inode]*inode{})
}

// put copies one inode, without what is below it, with the owner and mode that
// the step asks for. seen keeps hard links together.
func (c *copier) put(name string, n *inode, seen map[*inode]*inode) error {
	delete(c.implied, name)
	if known := seen[n]; known != nil {
		return c.layer.put(name, known)
	}
	out := *n
	out.disk = diskInode{}
	switch {
	case c.owner:
		out.uid, out.gid = c.uid, c.gid
	case !c.keepOwners:
		out.uid, out.gid = 0, 0
	}
	if c.chmod >= 0 && n.mode&typeMask != typeSymlink {
		out.mode = n.mode&typeMask | uint16(c.chmod)
	}
	if n.isDir() {
		out.children = map[string]*inode{}
	}
	seen[n] = &out
	return c.layer.put(name, &out)
}

// makeDirs makes a directory and those above it in the layer, and notes which
// of them are there already and must keep their attributes.
func (c *copier) makeDirs(name string) error {
	parts, err := splitPath(name)
	if err != nil {
		return sandbox.E("build", sandbox.Invalid, "", err)
	}
	for i := range parts {
		full := "/" + path.Join(parts[:i+1]...)
		if n, _ := c.layer.lookup(full); n != nil {
			continue
		}
		c.implied[full] = c.there.isDir(full)
		n := newDir(0o755)
		if c.owner {
			n.uid, n.gid = c.uid, c.gid
		}
		if err := c.layer.put(full, n); err != nil {
			return sandbox.E("build", sandbox.Invalid, "", err)
		}
	}
	return nil
}

// unpack adds an archive's files, as ADD does.
func (c *copier) unpack(ctx context.Context, b *build, data *io.SectionReader, dest string) error {
	u, err := newUnpacker(b.store.path("tmp"), b.store.opts.Limits, false)
	if err != nil {
		return err
	}
	c.unpacked = append(c.unpacked, u)
	r, err := decompress(io.NewSectionReader(data, 0, data.Size()))
	if err != nil {
		return badArchive("", err)
	}
	defer r.Close()
	if err := u.addTar(ctx, r, nil); err != nil {
		return badArchive("", err)
	}
	return c.copyDir(u.tree.root, dest)
}

// looksLikeArchive reports whether ADD unpacks a file.
func looksLikeArchive(data *io.SectionReader) bool {
	head := make([]byte, 512)
	n, _ := data.ReadAt(head, 0)
	return compression(head[:n]) != "" || n == 512 && string(head[257:262]) == "ustar"
}

// isDir reports whether a path leads to a directory, through links as well.
func (t *tree) isDir(name string) bool {
	parts, err := splitPath(name)
	if err != nil {
		return false
	}
	n, err := t.dir(parts, false)
	return n != nil && err == nil
}

// follow returns what a path leads to, through a link at its end as well.
func (t *tree) follow(name string) (*inode, error) {
	n, err := t.lookup(name)
	for links := 0; err == nil && n != nil && n.mode&typeMask == typeSymlink; links++ {
		if links >= maxSymlink {
			return nil, errLoop
		}
		target := n.target
		if !path.IsAbs(target) {
			target = path.Join("/", path.Dir(name), target)
		}
		name = path.Clean(target)
		n, err = t.lookup(name)
	}
	if err == nil && n == nil {
		err = fmt.Errorf("%q is not there", name)
	}
	return n, err
}

// contentHash is the hash of everything in a tree but times.
func (t *tree) contentHash() (string, error) {
	h := sha256.New()
	err := t.walk(func(name string, n *inode) error {
		fmt.Fprintf(h, "%q %o %d %d %q %d\n", name, n.mode, n.uid, n.gid, n.target, n.size())
		if n.data == nil {
			return nil
		}
		_, err := io.Copy(h, io.NewSectionReader(n.data, 0, n.data.Size()))
		return err
	})
	return fmt.Sprintf("%x", h.Sum(nil)), err
}
