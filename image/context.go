package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// contextDir is the directory that a build copies from, as a tree. Files are
// opened when they are read, one at a time; os.Root keeps symbolic links from
// leading out.
type contextDir struct {
	root *os.Root
	tree *tree

	name string // of the file that is open
	file *os.File
}

// maxContext bounds how many files a build context may have.
const maxContext = 1_000_000

// openContext reads the names and attributes of everything in dir that
// .dockerignore lets through.
func openContext(dir string) (*contextDir, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	c := &contextDir{root: root, tree: newTree()}
	if err := c.read(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close ends the use of the tree's contents.
func (c *contextDir) Close() error {
	if c.file != nil {
		_ = c.file.Close()
	}
	return c.root.Close()
}

func (c *contextDir) read() error {
	ignored, err := c.ignored()
	if err != nil {
		return err
	}
	count := 0
	return fs.WalkDir(c.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if count++; count > maxContext {
			return fmt.Errorf("the build context has more than %d files: name what to leave out in .dockerignore", maxContext)
		}
		if name != "." {
			skip, err := ignored.MatchesOrParentMatches(name)
			if err != nil {
				return err
			}
			if skip {
				if d.IsDir() && !ignored.Exclusions() { // nothing below can come back
					return fs.SkipDir
				}
				return nil
			}
		}
		return c.add(name, d)
	})
}

func (c *contextDir) ignored() (*patternmatcher.PatternMatcher, error) {
	f, err := c.root.Open(".dockerignore")
	if errors.Is(err, fs.ErrNotExist) {
		return patternmatcher.New(nil)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	patterns, err := ignorefile.ReadAll(io.LimitReader(f, maxDockerfile))
	if err != nil {
		return nil, err
	}
	return patternmatcher.New(patterns)
}

// add puts one file of the directory into the tree. Owners on the host mean
// nothing in the image; sockets and devices are left out.
func (c *contextDir) add(name string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	n := &inode{mode: permBits(info.Mode()), mtime: info.ModTime().Unix()}
	switch info.Mode().Type() {
	case 0:
		n.mode |= typeReg
		if info.Size() > 0 {
			n.data = io.NewSectionReader(&contextFile{c, name}, 0, info.Size())
		}
	case fs.ModeDir:
		n.mode |= typeDir
		n.children = map[string]*inode{}
	case fs.ModeSymlink:
		n.mode |= typeSymlink
		if n.target, err = c.root.Readlink(name); err != nil {
			return err
		}
	default:
		return nil
	}
	return c.tree.put(name, n)
}

// contextFile reads one file of a context.
type contextFile struct {
	dir  *contextDir
	name string
}

// ReadAt reads the file, keeping it open for the next call.
func (f *contextFile) ReadAt(p []byte, off int64) (int, error) {
	d := f.dir
	if d.file == nil || d.name != f.name {
		if d.file != nil {
			_ = d.file.Close()
		}
		var err error
		// Not blocking, should a pipe have taken the file's place meanwhile.
		d.file, err = d.root.OpenFile(f.name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			d.file = nil
			return 0, err
		}
		d.name = f.name
	}
	return d.file.ReadAt(p, off)
}

// matches returns the paths of the tree that a COPY source means, in order. A
// source is relative to the top; its components may be patterns.
func (t *tree) matches(source string) ([]string, error) {
	parts, err := splitPath(source)
	if err != nil {
		return nil, err
	}
	found := []string{""}
	for _, pattern := range parts {
		var next []string
		for _, dir := range found {
			names, err := t.matchNames(dir, pattern)
			if err != nil {
				return nil, err
			}
			next = append(next, names...)
		}
		found = next
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%q is not there, or .dockerignore leaves it out", source)
	}
	return found, nil
}

func (t *tree) matchNames(dir, pattern string) ([]string, error) {
	parts, err := splitPath(dir)
	if err != nil {
		return nil, err
	}
	n, err := t.dir(parts, false)
	if n == nil || err != nil {
		return nil, ignoreNotDir(err)
	}
	if _, ok := n.children[pattern]; ok {
		return []string{path.Join(dir, pattern)}, nil
	}
	var found []string
	for _, name := range n.names() {
		ok, err := path.Match(pattern, name)
		if err != nil {
			return nil, fmt.Errorf("pattern %q: %w", pattern, err)
		}
		if ok {
			found = append(found, path.Join(dir, name))
		}
	}
	return found, nil
}

// permBits turns Go's spelling of a mode into the twelve Unix permission bits.
func permBits(m fs.FileMode) uint16 {
	bits := uint16(m.Perm())
	if m&fs.ModeSetuid != 0 {
		bits |= 0o4000
	}
	if m&fs.ModeSetgid != 0 {
		bits |= 0o2000
	}
	if m&fs.ModeSticky != 0 {
		bits |= 0o1000
	}
	return bits
}
