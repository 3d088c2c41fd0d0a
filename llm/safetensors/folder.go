package safetensors

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/atoll-run/atoll/sandbox"
)

// A Folder is the weights of one model: a file, or several with an index. It can be
// used from several goroutines, except for Close.
type Folder struct {
	files   []*os.File
	tensors map[string]placed
	names   []string // sorted
}

type placed struct {
	Tensor
	file *os.File
}

const (
	single   = "model.safetensors"
	index    = "model.safetensors.index.json"
	maxIndex = 64 << 20 // bytes
	maxFiles = 4096
)

// OpenFolder opens model.safetensors, or the files that
// model.safetensors.index.json names. Errors are NotFound and Invalid.
func OpenFolder(dir string) (*Folder, error) {
	const op = "safetensors.OpenFolder"
	names, err := fileNames(dir)
	if err != nil {
		kind := sandbox.Invalid
		if errors.Is(err, fs.ErrNotExist) {
			kind = sandbox.NotFound
		}
		return nil, sandbox.E(op, kind, dir, err)
	}
	f := &Folder{tensors: map[string]placed{}}
	for _, name := range names {
		if err := f.open(filepath.Join(dir, name)); err != nil {
			_ = f.Close()
			return nil, sandbox.E(op, sandbox.Invalid, name, err)
		}
	}
	for name := range f.tensors {
		f.names = append(f.names, name)
	}
	slices.Sort(f.names)
	return f, nil
}

// fileNames returns the files of a folder that hold weights.
func fileNames(dir string) ([]string, error) {
	raw, err := readSmall(filepath.Join(dir, index), maxIndex)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, single)); err != nil {
			return nil, err
		}
		return []string{single}, nil
	}
	if err != nil {
		return nil, err
	}
	var doc struct {
		Map map[string]string `json:"weight_map"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", index, err)
	}
	var names []string
	for _, file := range doc.Map {
		if !filepath.IsLocal(file) || filepath.Base(file) != file {
			return nil, fmt.Errorf("%s names %q, which is not a file beside it", index, file)
		}
		names = append(names, file)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) == 0 || len(names) > maxFiles {
		return nil, fmt.Errorf("%s names %d files", index, len(names))
	}
	return names, nil
}

// readSmall reads a file that must not be large.
func readSmall(name string, limit int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", filepath.Base(name), limit)
	}
	return os.ReadFile(name)
}

func (f *Folder) open(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	f.files = append(f.files, file)
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	front, err := Decode(file, info.Size())
	if err != nil {
		return err
	}
	for _, t := range front.Tensors {
		if _, taken := f.tensors[t.Name]; taken {
			return fmt.Errorf("tensor %q stands in two files", t.Name)
		}
		f.tensors[t.Name] = placed{t, file}
	}
	return nil
}

// Names returns the names of all tensors, sorted; shared.
func (f *Folder) Names() []string { return f.names }

// Tensor returns what a tensor is; false when there is none of the name.
func (f *Folder) Tensor(name string) (Tensor, bool) {
	p, ok := f.tensors[name]
	return p.Tensor, ok
}

// Read returns the bytes of a tensor. Errors are NotFound, or Invalid for a file
// that has become shorter.
func (f *Folder) Read(name string) ([]byte, error) {
	const op = "safetensors.Read"
	p, ok := f.tensors[name]
	if !ok {
		return nil, sandbox.Errorf(op, sandbox.NotFound, name, "there is no such tensor")
	}
	b := make([]byte, p.Size)
	if _, err := p.file.ReadAt(b, p.Offset); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, name, err)
	}
	return b, nil
}

// Close closes all files.
func (f *Folder) Close() error {
	var all error
	for _, file := range f.files {
		all = errors.Join(all, file.Close())
	}
	return all
}
