package guesttest

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Programs reads programs of the host, those that it has, and the libraries that
// they need: what a root for tests is made of, by the paths that they have in it.
func Programs(names ...string) (map[string][]byte, error) {
	files := make(map[string][]byte)
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			continue // the tests look for what not every host has
		}
		data, err := addELF(files, path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		files["/usr/bin/"+name] = data
	}
	return files, nil
}

// addELF reads a program or library and adds the libraries that it needs under
// the paths where the loader looks for them.
func addELF(files map[string][]byte, path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := elf.Open(path)
	if errors.As(err, new(*elf.FormatError)) {
		return data, nil // a script
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name := make([]byte, p.Filesz-1)
			if _, err := p.ReadAt(name, 0); err != nil {
				return nil, err
			}
			if files[string(name)], err = os.ReadFile(string(name)); err != nil {
				return nil, err
			}
		}
	}
	for _, lib := range needed {
		for _, pattern := range []string{"/lib/*-linux-gnu/", "/usr/lib/*-linux-gnu/", "/lib64/", "/usr/lib64/", "/usr/lib/*-linux-gnu/perl-base/CORE/"} {
			found, _ := filepath.Glob(pattern + lib)
			if len(found) == 0 || files[found[0]] != nil {
				continue
			}
			files[found[0]] = []byte{}
			if files[found[0]], err = addELF(files, found[0]); err != nil {
				return nil, err
			}
			break
		}
	}
	return data, nil
}
