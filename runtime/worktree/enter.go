package worktree

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// argJail is the name under which our executable is started again to become a jail.
const argJail = "atoll-worktree-jail"

// IsReexec reports whether this process was started to become a jail. Such a
// process must call Main before it does anything else.
func IsReexec() bool { return os.Args[0] == argJail }

// File descriptors that a jail begins with.
const (
	fdPlan   = 3 // a pipe with the plan as JSON
	fdResult = 4 // a pipe for what went wrong; closed without a word by success
	fdExtra  = 5 // the first of those for the command, if any
)

// plan is what a jail looks like and what runs in it. Paths of sources are the
// host's; targets are inside.
type plan struct {
	Hostname string
	Binds    []bind
	Base     string // the checkout below the working tree
	Upper    string // what the sandbox changed in it
	Work     string // overlayfs's own; empty: the working tree is read-only
	Etc      map[string]string
	Loopback bool   // the network is new: bring its loopback up
	Pids     uint64 // limit of processes where no control group gives one; 0: none
	Dir      string
	Command  []string
	Env      []string
}

// bind is a directory or file of the host that a jail sees.
type bind struct {
	Source, Target string
	ReadOnly       bool
}

// Main turns this process into a jail and its command. It never returns.
func Main() {
	runtime.LockOSThread()
	unix.CloseOnExec(fdPlan)
	unix.CloseOnExec(fdResult)
	result := os.NewFile(fdResult, "result")
	var p plan
	err := json.NewDecoder(os.NewFile(fdPlan, "plan")).Decode(&p)
	if err == nil {
		err = p.enter()
	}
	fmt.Fprint(result, err)
	os.Exit(1)
}

// workdir is where a sandbox finds its working tree.
const workdir = sandbox.RepositoryDir

// root is where the new root is put together. In our mount namespace nobody
// needs what is below, and everybody can pass through it.
const root = "/tmp"

// tree is a mount that was copied and is not attached yet.
type tree struct {
	fd       int
	target   string
	readOnly bool
	dir      bool
}

// enter does all that makes a jail, in the one order that works, and executes
// the command.
func (p *plan) enter() error {
	// Sources may lie where only the user who started us may look, so they are
	// taken hold of before we become the sandbox's.
	trees, err := p.openTrees()
	if err != nil {
		return err
	}
	if err := becomeRoot(); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{stepPrivate, func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"new root", func() error {
			return unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=64m,uid=0,gid=0")
		}},
		{"skeleton", p.skeleton},
		{"working tree", func() error { return p.workingTree(trees[:2]) }},
		{"devices", devices},
		{"mounts", func() error { return attachAll(trees[2:]) }},
		{"processes", processes},
		{"pivot", pivot},
		{"host name", func() error { return unix.Sethostname([]byte(p.Hostname)) }},
		{"loopback", p.loopback},
		{"limits", p.limits},
		{"privileges", p.dropPrivileges},
		{"directory", func() error { return unix.Chdir(p.Dir) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return fmt.Errorf("execute %s: %w", p.Command[0], unix.Exec(p.Command[0], p.Command, p.Env))
}

// stepPrivate is the first step that needs the rights of a namespace's root.
const stepPrivate = "separate mounts"

// Where the layers of the working tree stand until they are mounted.
const (
	stagedBase   = root + "/.base"
	stagedLayers = root + "/.layers"
)

// openTrees copies the mounts of all sources: the base and the layers of the
// working tree first, then the binds.
func (p *plan) openTrees() ([]tree, error) {
	binds := append([]bind{
		{p.Base, stagedBase, true},
		{filepath.Dir(p.Upper), stagedLayers, p.Work == ""},
	}, hostBinds()...)
	binds = append(binds, p.Binds...)
	var trees []tree
	for _, b := range binds {
		fd, err := unix.OpenTree(unix.AT_FDCWD, b.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", b.Source, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, err
		}
		target := b.Target
		if !strings.HasPrefix(target, root+"/.") {
			target = root + target
		}
		trees = append(trees, tree{fd, target, b.ReadOnly, st.Mode&unix.S_IFMT == unix.S_IFDIR})
	}
	return trees, nil
}

// becomeRoot makes us the one user of our user namespace. Whoever started us
// mapped us to it already, unless it was root acting for another user.
func becomeRoot() error {
	if unix.Getuid() == 0 && unix.Getgid() == 0 {
		return nil
	}
	if err := unix.Setresgid(0, 0, 0); err != nil {
		return fmt.Errorf("become the group: %w", err)
	}
	if err := unix.Setresuid(0, 0, 0); err != nil {
		return fmt.Errorf("become the user: %w", err)
	}
	return nil
}

// attach puts a copied mount in its place.
func (t tree) attach() error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID}
	if !strings.HasPrefix(t.target, root+"/dev/") {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV
	}
	if t.readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(t.fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("attributes of %s: %w", t.target, err)
	}
	target, err := openTarget(t.target, t.dir)
	if err != nil {
		return err
	}
	defer target.Close()
	const byDescriptors = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	if err := unix.MoveMount(t.fd, "", int(target.Fd()), "", byDescriptors); err != nil {
		return fmt.Errorf("attach %s: %w", t.target, err)
	}
	return unix.Close(t.fd)
}

func attachAll(trees []tree) error {
	for _, t := range trees {
		if err := t.attach(); err != nil {
			return err
		}
	}
	return nil
}

// openTarget opens the directory or file that a mount goes over, and makes it if
// it is missing. What the sandbox left behind earlier may be full of links: one
// that leads out of the new root is an error.
func openTarget(target string, dir bool) (*os.File, error) {
	inside, err := os.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer inside.Close()
	rel := strings.TrimPrefix(target, root+"/")
	if dir {
		err = inside.MkdirAll(rel, 0o755)
	} else if err = inside.MkdirAll(filepath.Dir(rel), 0o755); err == nil {
		var f *os.File
		if f, err = inside.OpenFile(rel, os.O_CREATE|unix.O_NONBLOCK, 0o644); err == nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	return inside.OpenFile(rel, unix.O_PATH, 0)
}

// skeleton makes what no mount brings.
func (p *plan) skeleton() error {
	for _, dir := range []string{"proc", "dev", "dev/pts", "dev/shm", "etc", "home", "run", "tmp", "var", "var/lib", "var/cache", "var/log", workdir} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, name := range topLinks {
		// A host without merged /usr has directories here; see hostBinds.
		if target, err := os.Readlink("/" + name); err == nil {
			if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
				return err
			}
		}
	}
	for name, target := range map[string]string{
		"var/tmp": "/tmp", "var/run": "/run", "dev/ptmx": "pts/ptmx", "dev/fd": "/proc/self/fd",
		"dev/stdin": "/proc/self/fd/0", "dev/stdout": "/proc/self/fd/1", "dev/stderr": "/proc/self/fd/2",
		"etc/mtab": "/proc/self/mounts",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for name, content := range p.Etc {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// workingTree mounts the working tree: the base, and what was changed on top.
func (p *plan) workingTree(layers []tree) error {
	if err := attachAll(layers); err != nil {
		return err
	}
	upper := filepath.Join(stagedLayers, filepath.Base(p.Upper))
	options, flags := "userxattr,index=off,lowerdir=", uintptr(unix.MS_NOSUID|unix.MS_NODEV)
	if p.Work == "" {
		options += upper + ":" + stagedBase
		flags |= unix.MS_RDONLY
	} else {
		options += stagedBase + ",upperdir=" + upper + ",workdir=" + filepath.Join(stagedLayers, filepath.Base(p.Work))
	}
	if err := unix.Mount("overlay", root+workdir, "overlay", flags, options); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	// The overlay has its own hold on them; nobody inside may.
	for _, dir := range []string{stagedBase, stagedLayers} {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return err
		}
		if err := os.Remove(dir); err != nil {
			return err
		}
	}
	return nil
}

func devices() error {
	const safe = unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("devpts", root+"/dev/pts", "devpts", safe, "newinstance,ptmxmode=0666,mode=0620"); err != nil {
		return fmt.Errorf("devpts: %w", err)
	}
	return unix.Mount("tmpfs", root+"/dev/shm", "tmpfs", safe|unix.MS_NODEV, "mode=1777")
}

// processes mounts /proc and takes from it what speaks of, or to, the host.
func processes() error {
	proc := root + "/proc"
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	for _, name := range []string{"sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi"} {
		path := filepath.Join(proc, name)
		err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, "")
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, name := range []string{"kcore", "keys", "key-users", "timer_list", "sched_debug", "kallsyms", "kpagecount", "kpageflags"} {
		path := filepath.Join(proc, name)
		if err := unix.Mount(root+"/dev/null", path, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func pivot() error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}

// loopback brings loopback up in a network of our own; others have theirs.
func (p *plan) loopback() error {
	if !p.Loopback {
		return nil
	}
	return loopbackUp()
}

// loopbackUp brings loopback up in this thread's network.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil || ifr.Uint16()&unix.IFF_UP != 0 {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func (p *plan) limits() error {
	limits := map[int]uint64{unix.RLIMIT_CORE: 0}
	if p.Pids > 0 {
		limits[unix.RLIMIT_NPROC] = p.Pids
	}
	for resource, limit := range limits {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			return err
		}
	}
	return nil
}

// dropPrivileges gives up all that a process could use against its host.
func (p *plan) dropPrivileges() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	if err := p.landlock(); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return err
	}
	return denySyscalls()
}

// landlock is a second wall around files, as far as the kernel has it: mounts
// say what there is, this says what may be written.
func (p *plan) landlock() error {
	dirs := []string{"/proc", "/tmp", "/run", "/home", "/dev", "/var", "/etc", workdir} // /proc guards itself
	var files []string
	for _, b := range p.Binds {
		info, err := os.Stat(b.Target)
		switch {
		case b.ReadOnly || err != nil:
		case info.IsDir():
			dirs = append(dirs, b.Target)
		default:
			files = append(files, b.Target)
		}
	}
	return landlock.V5.BestEffort().RestrictPaths(
		landlock.RODirs("/"),
		landlock.RWDirs(dirs...).WithRefer().WithIoctlDev(),
		landlock.RWFiles(files...),
	)
}
