package server

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// account is whom a process runs as and whose files are made.
type account struct {
	name   string
	uid    int
	gid    int
	groups []int // supplementary
	home   string
	shell  string
}

// errNoAccount is returned for a user that /etc/passwd does not have.
var errNoAccount = errors.New("no such user")

// accounts answers from the text of /etc/passwd and /etc/group.
type accounts struct {
	passwd []byte
	group  []byte
}

// loadAccounts reads the accounts there are now, so that users made inside the
// sandbox exist at once. A missing file means an image without users: only
// numbers are known.
func loadAccounts() accounts {
	return accounts{passwdFile.read("/etc/passwd"), groupFile.read("/etc/group")}
}

var passwdFile, groupFile cachedFile

// cachedFile keeps the text of a file until the file changes: every call needs
// to know its user, and system calls cost much in a user-space kernel.
type cachedFile struct {
	mu    sync.Mutex
	stamp fileStamp
	text  []byte // never changed in place
}

// fileStamp differs between two versions of a file.
type fileStamp struct {
	inode        uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// read returns the text; nil when there is none.
func (c *cachedFile) read(path string) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return nil
	}
	if stamp := (fileStamp{st.Ino, st.Size, st.Mtim, st.Ctim}); c.text == nil || stamp != c.stamp {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		c.stamp, c.text = stamp, text
	}
	return c.text
}

// lookup finds "name", "uid", "name:group" or "uid:gid", as container images
// write them. A number that is not in /etc/passwd is an account without a home.
func (a accounts) lookup(spec string) (account, error) {
	user, group, _ := strings.Cut(spec, ":")
	acct, ok := a.find(func(f []string) bool { return f[0] == user })
	if id, err := strconv.ParseUint(user, 10, 31); !ok && err == nil {
		acct, ok = a.find(func(f []string) bool { return f[2] == user })
		if !ok {
			acct, ok = account{name: user, uid: int(id), home: "/", shell: "/bin/sh"}, true
		}
	}
	if !ok {
		return account{}, fmt.Errorf("%w: %q", errNoAccount, user)
	}
	if group != "" {
		gid, ok := a.gid(group)
		if !ok {
			return account{}, fmt.Errorf("%w: group %q", errNoAccount, group)
		}
		acct.gid = gid
	}
	acct.groups = a.memberships(acct)
	return acct, nil
}

// find returns the first account whose fields match.
func (a accounts) find(match func(fields []string) bool) (account, bool) {
	for f := range records(a.passwd, 7) {
		uid, err1 := strconv.ParseUint(f[2], 10, 31)
		gid, err2 := strconv.ParseUint(f[3], 10, 31)
		if err1 != nil || err2 != nil || !match(f) {
			continue
		}
		acct := account{name: f[0], uid: int(uid), gid: int(gid), home: f[5], shell: f[6]}
		if acct.home == "" {
			acct.home = "/"
		}
		if acct.shell == "" {
			acct.shell = "/bin/sh"
		}
		return acct, true
	}
	return account{}, false
}

func (a accounts) gid(group string) (int, bool) {
	for f := range records(a.group, 4) {
		if id, err := strconv.ParseUint(f[2], 10, 31); err == nil && (f[0] == group || f[2] == group) {
			return int(id), true
		}
	}
	id, err := strconv.ParseUint(group, 10, 31)
	return int(id), err == nil
}

func (a accounts) memberships(acct account) []int {
	var ids []int
	for f := range records(a.group, 4) {
		id, err := strconv.ParseUint(f[2], 10, 31)
		if err != nil || int(id) == acct.gid {
			continue
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if member == acct.name {
				ids = append(ids, int(id))
				break
			}
		}
	}
	return ids
}

// names maps user and group ids to names, for directory listings.
func (a accounts) names() (users, groups map[uint32]string) {
	index := func(text []byte, fields int) map[uint32]string {
		m := map[uint32]string{}
		for f := range records(text, fields) {
			id, err := strconv.ParseUint(f[2], 10, 32)
			if _, taken := m[uint32(id)]; err == nil && !taken {
				m[uint32(id)] = f[0]
			}
		}
		return m
	}
	return index(a.passwd, 7), index(a.group, 4)
}

// records yields the lines of a passwd-like file that have the right number of
// fields, split at colons.
func records(text []byte, fields int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		lines := bufio.NewScanner(bytes.NewReader(text))
		for lines.Scan() {
			f := strings.Split(lines.Text(), ":")
			if len(f) == fields && f[0] != "" && !strings.HasPrefix(f[0], "#") && !yield(f) {
				return
			}
		}
	}
}

// canSwitch reports whether this process may become other users: it is root and
// its user namespace knows more than one user. Neither changes while it runs.
var canSwitch = sync.OnceValue(func() bool {
	if os.Geteuid() != 0 {
		return false
	}
	idMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return true // a kernel without user namespaces
	}
	f := strings.Fields(string(idMap))
	return len(f) != 3 || f[2] != "1"
})

// self is the account of this process, whatever /etc/passwd says.
func self(known accounts) account {
	uid := strconv.Itoa(os.Geteuid())
	acct, ok := known.find(func(f []string) bool { return f[2] == uid })
	if !ok {
		acct = account{name: uid, home: "/", shell: "/bin/sh"}
	}
	acct.uid, acct.gid = os.Geteuid(), os.Getegid()
	if home := os.Getenv("HOME"); home != "" && !canSwitch() {
		acct.home = home
	}
	return acct
}

// switches reports whether running as the account needs a change of user.
func (a account) switches() bool {
	return canSwitch() && (a.uid != os.Geteuid() || a.gid != os.Getegid() || len(a.groups) > 0)
}

// credential is the account as the kernel takes it.
func (a account) credential() *syscall.Credential {
	c := &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	for _, g := range append([]int{a.gid}, a.groups...) {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
}

// own gives a file to the account, where we can.
func (a account) own(path string) error {
	if !canSwitch() {
		return nil
	}
	return os.Lchown(path, a.uid, a.gid)
}

// ownFile gives an open file to the account, where we can. A file that it owns
// already is left alone, since watchers would hear of a change.
func (a account) ownFile(f *os.File) error {
	if !canSwitch() {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == a.uid && int(st.Gid) == a.gid {
		return nil
	}
	return f.Chown(a.uid, a.gid)
}
