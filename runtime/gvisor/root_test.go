package gvisor

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// rootTools is what the tests' EROFS root has.
var rootTools = []string{
	"sh", "bash", "cat", "chmod", "cksum", "cp", "cut", "date", "dd", "df", "du", "echo", "env", "false", "find", "grep", "head", "id",
	"kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mv", "nproc", "od", "printf", "ps", "readlink", "rm", "rmdir", "sed", "seq",
	"setsid", "sha256sum", "sleep", "sort", "stat", "stty", "sync", "tail", "tee", "test", "touch", "tr", "true", "truncate", "uname",
	"uniq", "wc", "xargs", "yes",
}

// MakeRoot makes an EROFS root in dir from the host's own tools and the libraries
// that they need: enough for a shell, and with no /proc, /dev, /tmp or /etc/passwd.
func MakeRoot(dir string) (string, error) {
	files := make(map[string][]byte)
	for _, tool := range rootTools {
		path, err := exec.LookPath(tool)
		if err != nil {
			continue // the tests look for what not every host has
		}
		data, err := addELF(files, path)
		if err != nil {
			return "", fmt.Errorf("%s: %w", tool, err)
		}
		files["/usr/bin/"+tool] = data
	}
	dirs := map[string]bool{"/": true, "/removable": true}
	for name := range files {
		for d := filepath.Dir(name); d != "/"; d = filepath.Dir(d) {
			dirs[d] = true
		}
	}
	var entries []entry
	for d := range dirs {
		entries = append(entries, entry{name: d, mode: fs.ModeDir | 0o755})
	}
	for name, data := range files {
		entries = append(entries, entry{name: name, mode: 0o755, data: data})
	}
	entries = append(entries,
		entry{name: "/bin", mode: fs.ModeSymlink | 0o777, link: "usr/bin"},
		entry{name: "/removable/file", mode: 0o644, data: []byte("x")})
	slices.SortFunc(entries, func(a, b entry) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return makeImage(dir, entries)
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
