package quant

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// parts is a folder with the layers that are done, each a file of its tensors' bytes
// one after the other. A file that is there is whole.
type parts struct{ dir string }

// openParts opens the folder. What another source or recipe left is removed.
func openParts(dir, fingerprint string) (*parts, error) {
	p := &parts{dir}
	name := filepath.Join(dir, "recipe")
	old, err := os.ReadFile(name)
	if err == nil && string(old) == fingerprint {
		return p, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := p.remove(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	return p, p.write("recipe", [][]byte{[]byte(fingerprint)})
}

func (p *parts) name(n int) string { return fmt.Sprintf("layer-%05d", n) }

// missing returns which of the layers are not there.
func (p *parts) missing(layers int) []int {
	var out []int
	for n := range layers {
		if _, err := os.Stat(filepath.Join(p.dir, p.name(n))); err != nil {
			out = append(out, n)
		}
	}
	return out
}

func (p *parts) put(n int, tensors [][]byte) error { return p.write(p.name(n), tensors) }

func (p *parts) open(n int) (io.ReadCloser, error) { return os.Open(filepath.Join(p.dir, p.name(n))) }

// remove deletes the folder if it is one of ours.
func (p *parts) remove() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		var n int
		if _, err := fmt.Sscanf(e.Name(), "layer-%05d", &n); err != nil && e.Name() != "recipe" && e.Name() != "recipe.new" {
			return fmt.Errorf("%s has %q in it, which quantising has not put there", p.dir, e.Name())
		}
	}
	return os.RemoveAll(p.dir)
}

// write writes a file, whole or not at all.
func (p *parts) write(name string, pieces [][]byte) (err error) {
	final := filepath.Join(p.dir, name)
	f, err := os.Create(final + ".new")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(final + ".new")
		}
	}()
	for _, b := range pieces {
		if _, err := f.Write(b); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(final+".new", final)
}
