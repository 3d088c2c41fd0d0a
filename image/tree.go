package image

import (
	"errors"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"
)

// File types as in a Unix mode.
const (
	typeMask    = 0o170000
	typeDir     = 0o040000
	typeReg     = 0o100000
	typeSymlink = 0o120000
	typeFifo    = 0o010000
)

const (
	maxName    = 255  // bytes of one path component
	maxPath    = 4096 // bytes of a whole path
	maxDepth   = 256  // directories from the root, bounds every recursion over a tree
	maxTarget  = 4095 // bytes of a symbolic link's target
	maxSymlink = 40   // symbolic links followed in one path, as in Linux
)

// inode is one file, directory or link of a tree. Paths that are hard links of
// each other share one inode.
type inode struct {
	mode     uint16 // type and permissions
	uid, gid uint32
	mtime    int64 // seconds since 1970
	nsec     uint32
	xattrs   map[string]string // nil when there are none
	target   string            // of a symbolic link
	children map[string]*inode // of a directory; nil otherwise
	data     *io.SectionReader // of a regular file; nil when it is empty

	disk diskInode // where the EROFS writer put it
}

func (n *inode) isDir() bool { return n.mode&typeMask == typeDir }

// setAttributes makes n look like other, and leaves its contents alone.
func (n *inode) setAttributes(other *inode) {
	n.mode, n.uid, n.gid = other.mode, other.uid, other.gid
	n.mtime, n.nsec, n.xattrs = other.mtime, other.nsec, other.xattrs
}

func (n *inode) size() int64 {
	switch {
	case n.data != nil:
		return n.data.Size()
	case n.mode&typeMask == typeSymlink:
		return int64(len(n.target))
	}
	return 0
}

// names returns the names of a directory's children in byte order.
func (n *inode) names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// tree is a file system in memory: everything but the contents of files, which
// stay where they were read from.
type tree struct {
	root *inode

	// fresh holds what the layer now being applied wrote, and the directories
	// on the way to it: whiteouts concern only the layers beneath.
	fresh map[slot]struct{}
}

// slot is a name in a directory.
type slot struct {
	dir  *inode
	name string
}

func newTree() *tree {
	return &tree{root: newDir(0o755), fresh: map[slot]struct{}{}}
}

// nextLayer makes all that is there belong to the layers beneath.
func (t *tree) nextLayer() { t.fresh = map[slot]struct{}{} }

func newDir(perm uint16) *inode {
	return &inode{mode: typeDir | perm, children: map[string]*inode{}}
}

// splitPath turns an archive's name into components. A leading slash means the
// image's root. Names that climb are refused rather than cleaned: nobody
// makes them by accident.
func splitPath(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("path of %d bytes is longer than %d", len(name), maxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("path %q holds a zero byte", name)
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return nil, fmt.Errorf("path %q climbs out with %q", name, "..")
		case len(part) > maxName:
			return nil, fmt.Errorf("path %q has a component longer than %d bytes", name, maxName)
		}
		parts = append(parts, part)
	}
	if len(parts) > maxDepth {
		return nil, fmt.Errorf("path %q is deeper than %d directories", name, maxDepth)
	}
	return parts, nil
}

var (
	errLoop   = errors.New("too many levels of symbolic links")
	errNotDir = errors.New("not a directory")
)

// dir returns the directory that parts leads to, following symbolic links
// inside the tree as chroot would: ".." at the root stays there. With create
// it makes what is missing and marks the way as written by this layer; without
// it a missing directory gives nil and no error.
func (t *tree) dir(parts []string, create bool) (*inode, error) {
	stack := []*inode{t.root}
	todo := append([]string(nil), parts...)
	for links := 0; len(todo) > 0; {
		here := stack[len(stack)-1]
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		next := here.children[name]
		switch {
		case next == nil && !create:
			return nil, nil
		case next == nil:
			next = newDir(0o755)
			here.children[name] = next
		case next.mode&typeMask == typeSymlink:
			if links++; links > maxSymlink {
				return nil, errLoop
			}
			if strings.HasPrefix(next.target, "/") {
				stack = stack[:1]
			}
			todo = append(linkParts(next.target), todo...)
			continue
		case !next.isDir():
			return nil, fmt.Errorf("%q is %w", name, errNotDir)
		}
		if create {
			t.fresh[slot{here, name}] = struct{}{}
		}
		if stack = append(stack, next); len(stack) > maxDepth {
			return nil, fmt.Errorf("deeper than %d directories", maxDepth)
		}
	}
	return stack[len(stack)-1], nil
}

// linkParts splits a link's target, keeping "..".
func linkParts(target string) []string {
	var parts []string
	for part := range strings.SplitSeq(target, "/") {
		if part != "" && part != "." {
			parts = append(parts, part)
		}
	}
	return parts
}

// lookup returns the inode at a path, not following a link at its end; nil when
// there is none.
func (t *tree) lookup(name string) (*inode, error) {
	parts, err := splitPath(name)
	if err != nil || len(parts) == 0 {
		return t.root, err
	}
	dir, err := t.dir(parts[:len(parts)-1], false)
	if err != nil || dir == nil {
		return nil, err
	}
	return dir.children[parts[len(parts)-1]], nil
}

// put places n at a path. A directory put over a directory changes its
// attributes and keeps what is in it; anything else replaces what was there.
func (t *tree) put(name string, n *inode) error {
	parts, err := splitPath(name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if !n.isDir() {
			return fmt.Errorf("the root is %w", errNotDir)
		}
		t.root.setAttributes(n)
		return nil
	}
	dir, err := t.dir(parts[:len(parts)-1], true)
	if err != nil {
		return fmt.Errorf("path %q: %w", name, err)
	}
	base := parts[len(parts)-1]
	t.fresh[slot{dir, base}] = struct{}{}
	if old := dir.children[base]; old != nil && old.isDir() && n.isDir() {
		old.setAttributes(n)
		return nil
	}
	dir.children[base] = n
	return nil
}

// link makes name another path of the inode at target.
func (t *tree) link(target, name string) error {
	n, err := t.lookup(target)
	switch {
	case err != nil:
		return fmt.Errorf("hard link %q: %w", name, err)
	case n == nil:
		return fmt.Errorf("hard link %q points to %q, which does not exist", name, target)
	case n.isDir():
		return fmt.Errorf("hard link %q points to the directory %q", name, target)
	}
	return t.put(name, n)
}

// hide applies a whiteout: it removes what lower layers have at a path.
func (t *tree) hide(name string) error {
	parts, err := splitPath(name)
	if err != nil || len(parts) == 0 {
		return err
	}
	dir, err := t.dir(parts[:len(parts)-1], false)
	if dir == nil || err != nil {
		return ignoreNotDir(err)
	}
	t.pruneName(dir, parts[len(parts)-1])
	return nil
}

// opaque removes from a directory everything that lower layers put there.
func (t *tree) opaque(name string) error {
	parts, err := splitPath(name)
	if err != nil {
		return err
	}
	dir, err := t.dir(parts, false)
	if dir == nil || err != nil {
		return ignoreNotDir(err)
	}
	t.prune(dir)
	return nil
}

// ignoreNotDir drops the error of a whiteout below something that is no
// directory: there is nothing to hide.
func ignoreNotDir(err error) error {
	if errors.Is(err, errNotDir) {
		return nil
	}
	return err
}

// prune removes from a directory what the present layer did not write.
func (t *tree) prune(dir *inode) {
	for name := range dir.children {
		t.pruneName(dir, name)
	}
}

func (t *tree) pruneName(dir *inode, name string) {
	child := dir.children[name]
	if _, ok := t.fresh[slot{dir, name}]; !ok {
		delete(dir.children, name)
	} else if child.isDir() {
		t.prune(child)
	}
}

// walk calls f for every path of the tree, parents before children, in byte
// order, until f fails. Paths start with a slash.
func (t *tree) walk(f func(name string, n *inode) error) error {
	var visit func(name string, n *inode) error
	visit = func(name string, n *inode) error {
		if err := f(name, n); err != nil {
			return err
		}
		for _, child := range n.names() {
			if err := visit(path.Join(name, child), n.children[child]); err != nil {
				return err
			}
		}
		return nil
	}
	return visit("/", t.root)
}
