package gvisor

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// hostRoot is what a sandbox with RootHost is made of: an image with a fresh /etc,
// /home, /tmp and /var, and the host's directories of programs over it.
type hostRoot struct {
	image string
	binds []sandbox.Mount
}

// hostDirs are the directories of programs. On most systems all but /usr are links into it.
var hostDirs = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// hostFiles are those of the host's /etc that programs in /usr need and that
// tell nothing about the host's users or secrets.
var hostFiles = []string{
	"/etc/alternatives", "/etc/bash.bashrc", "/etc/ca-certificates.conf", "/etc/debian_version", "/etc/fonts",
	"/etc/inputrc", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/lsb-release",
	"/etc/magic", "/etc/magic.mime", "/etc/mime.types", "/etc/os-release", "/etc/perl", "/etc/profile", "/etc/protocols",
	"/etc/python3", "/etc/python3.11", "/etc/python3.12", "/etc/services", "/etc/skel",
	"/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/openssl.cnf", "/etc/terminfo",
}

// maxHostFile is the largest file of /etc that is copied, in bytes.
const maxHostFile = 4 << 20

// freshFiles are those of /etc that every sandbox gets new.
var freshFiles = map[string]string{
	"/etc/passwd": "root:x:0:0:root:/root:/bin/bash\n" +
		"daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
		"www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n" +
		"user:x:1000:1000:user:/home/user:/bin/bash\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"/etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nsudo:x:27:user\nwww-data:x:33:\nusers:x:100:\nuser:x:1000:\nnogroup:x:65534:\n",
	"/etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\n" +
		"protocols: files\n",
	"/etc/shells": "/bin/sh\n/bin/bash\n",
}

// freshDirs are directories that every sandbox gets new, parents first.
var freshDirs = []entry{
	{name: "/", mode: fs.ModeDir | 0o755},
	{name: "/.atoll", mode: fs.ModeDir | 0o755},
	{name: "/dev", mode: fs.ModeDir | 0o755},
	{name: "/etc", mode: fs.ModeDir | 0o755},
	{name: "/etc/ssl", mode: fs.ModeDir | 0o755},
	{name: "/etc/ssl/certs", mode: fs.ModeDir | 0o755},
	{name: "/home", mode: fs.ModeDir | 0o755},
	{name: "/home/user", mode: fs.ModeDir | 0o755, uid: 1000, gid: 1000},
	{name: "/mnt", mode: fs.ModeDir | 0o755},
	{name: "/opt", mode: fs.ModeDir | 0o755},
	{name: "/proc", mode: fs.ModeDir | 0o555},
	{name: "/root", mode: fs.ModeDir | 0o700},
	{name: "/run", mode: fs.ModeDir | 0o755},
	{name: "/run/lock", mode: fs.ModeDir | fs.ModeSticky | 0o777},
	{name: "/srv", mode: fs.ModeDir | 0o755},
	{name: "/sys", mode: fs.ModeDir | 0o555},
	{name: "/tmp", mode: fs.ModeDir | fs.ModeSticky | 0o777},
	{name: "/var", mode: fs.ModeDir | 0o755},
	{name: "/var/cache", mode: fs.ModeDir | 0o755},
	{name: "/var/lib", mode: fs.ModeDir | 0o755},
	{name: "/var/log", mode: fs.ModeDir | 0o755},
	{name: "/var/tmp", mode: fs.ModeDir | fs.ModeSticky | 0o777},
	{name: "/var/lock", mode: fs.ModeSymlink | 0o777, link: "/run/lock"},
	{name: "/var/run", mode: fs.ModeSymlink | 0o777, link: "/run"},
}

// makeHostRoot looks at the host and makes the image in dir.
func makeHostRoot(dir string) (hostRoot, error) {
	var h hostRoot
	entries := append([]entry(nil), freshDirs...)
	for _, d := range hostDirs {
		st, err := os.Lstat(d)
		if err != nil {
			continue // not every system has them all
		}
		e := entry{name: d, mode: fs.ModeDir | 0o755}
		if st.Mode()&fs.ModeSymlink != 0 {
			if e.link, err = os.Readlink(d); err != nil {
				return h, err
			}
			e.mode = fs.ModeSymlink | 0o777
		} else {
			h.binds = append(h.binds, sandbox.Mount{Source: d, Target: d, ReadOnly: true})
		}
		entries = append(entries, e)
	}
	for _, name := range []string{"/etc/group", "/etc/nsswitch.conf", "/etc/passwd", "/etc/shells"} {
		entries = append(entries, entry{name: name, mode: 0o644, data: []byte(freshFiles[name])})
	}
	for _, name := range hostFiles {
		entries = appendTree(entries, name)
	}
	for _, e := range appendTree(nil, "/etc/skel") {
		if e.name != "/etc/skel" {
			e.name, e.uid, e.gid = "/home/user"+strings.TrimPrefix(e.name, "/etc/skel"), 1000, 1000
			entries = append(entries, e)
		}
	}
	var err error
	h.image, err = makeImage(dir, entries)
	return h, err
}

// appendTree adds a file or directory of the host. What cannot be read or is not
// an ordinary file is left out: a sandbox is usable without it.
func appendTree(entries []entry, root string) []entry {
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipAll
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		e := entry{name: path, mode: info.Mode()}
		switch {
		case info.IsDir():
		case info.Mode()&fs.ModeSymlink != 0:
			if e.link, err = os.Readlink(path); err != nil {
				return nil
			}
		case info.Mode().IsRegular() && info.Size() <= maxHostFile && info.Mode().Perm()&0o004 != 0:
			if e.data, err = os.ReadFile(path); err != nil {
				return nil
			}
		default:
			return nil
		}
		entries = append(entries, e)
		return nil
	})
	return entries
}
