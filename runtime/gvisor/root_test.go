package gvisor

import (
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/atoll-run/atoll/guest/guesttest"
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
	files, err := guesttest.Programs(rootTools...)
	if err != nil {
		return "", err
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
