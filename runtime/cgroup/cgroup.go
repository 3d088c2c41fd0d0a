// Package cgroup bounds, measures and ends the processes of a sandbox by the
// kernel's control groups, of version 1 or 2.
//
// All groups of one runtime lie below one parent, named by a prefix of its own.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

const root = "/sys/fs/cgroup"

// controllers are those that bound a sandbox. In version 1 each is a tree of its own.
var controllers = []string{"cpu", "cpuacct", "memory", "pids"}

// parentWeight is how much more processor time the group of all sandboxes gets than
// a neighbour when both want it. To its neighbours, single processes among them,
// it is one group however many sandboxes are in it.
const parentWeight = 16

// Parent holds all control groups of one runtime.
type Parent struct {
	prefix string
	v2     bool
	home   []string // version 1: the directories of the groups in which this process is
}

// Group is the control group of one sandbox. It may not exist yet, or any more.
type Group struct {
	parent *Parent
	name   string
}

// Limits bounds what a group's processes take together. Zero CPUs is no limit.
type Limits struct {
	CPUs   float64 // cores
	Memory int64   // bytes, page cache included
	Tasks  int     // processes and threads
}

// Open makes the parent group. It fails with Denied where the control groups
// cannot be written.
func Open(prefix string) (*Parent, error) {
	const op = "cgroup.Open"
	g := &Parent{prefix: prefix}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, sandbox.E(op, sandbox.Denied, root, err).WithHint("mount the cgroup file system")
	}
	g.v2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	for _, dir := range g.dirs("") {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, sandbox.E(op, sandbox.Denied, dir, err).
				WithHint("sandboxes need a writable cgroup tree with the cpu, memory and pids controllers")
		}
	}
	if !g.v2 {
		if err := os.WriteFile(g.Group("").file("cpu", "cpu.shares"), []byte(strconv.Itoa(1024*parentWeight)), 0o644); err != nil {
			return nil, sandbox.E(op, sandbox.Denied, prefix, err)
		}
		var err error
		g.home, err = homeGroups()
		return g, err
	}
	for _, dir := range []string{root, filepath.Join(root, prefix)} {
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0o644)
		if err != nil {
			return nil, sandbox.E(op, sandbox.Denied, dir, err).
				WithHint("the cpu, memory and pids controllers must be available to child groups")
		}
	}
	if err := os.WriteFile(g.Group("").file("cpu", "cpu.weight"), []byte(strconv.Itoa(100*parentWeight)), 0o644); err != nil {
		return nil, sandbox.E(op, sandbox.Denied, prefix, err)
	}
	return g, nil
}

// homeGroups finds the groups of this process in version 1.
func homeGroups() ([]string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for _, c := range strings.Split(parts[1], ",") {
			if slices.Contains(controllers, c) {
				dirs = append(dirs, filepath.Join(root, c, parts[2]))
			}
		}
	}
	return dirs, nil
}

// dirs returns the directories of a group: one in version 2, one a controller in version 1.
func (g *Parent) dirs(name string) []string {
	if g.v2 {
		return []string{filepath.Join(root, g.prefix, name)}
	}
	dirs := make([]string, len(controllers))
	for i, c := range controllers {
		dirs[i] = filepath.Join(root, c, g.prefix, name)
	}
	return dirs
}

// List returns the names of all groups that exist.
func (g *Parent) List() []string {
	seen := make(map[string]bool)
	var names []string
	for _, dir := range g.dirs("") {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// Group is the group of this name, whether it exists or not.
func (g *Parent) Group(name string) *Group { return &Group{parent: g, name: name} }

// Name is the group's name below its parent.
func (c *Group) Name() string { return c.name }

// file is the path of a control file; controller is looked at in version 1 only.
func (c *Group) file(controller, name string) string {
	if c.parent.v2 {
		return filepath.Join(root, c.parent.prefix, c.name, name)
	}
	return filepath.Join(root, controller, c.parent.prefix, c.name, name)
}

// Create makes the group.
func (c *Group) Create() error {
	for _, dir := range c.parent.dirs(c.name) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Limit sets the bounds.
func (c *Group) Limit(l Limits) error {
	const period = 100_000 // µs
	settings := [][3]string{{"pids", "pids.max", strconv.Itoa(l.Tasks)}}
	memory, quota := strconv.FormatInt(l.Memory, 10), int64(math.Ceil(l.CPUs*period))
	if c.parent.v2 {
		settings = append(settings, [3]string{"memory", "memory.max", memory})
		if quota > 0 {
			settings = append(settings, [3]string{"cpu", "cpu.max", fmt.Sprintf("%d %d", quota, period)})
		}
	} else {
		settings = append(settings, [3]string{"memory", "memory.limit_in_bytes", memory})
		if quota > 0 {
			settings = append(settings, [3]string{"cpu", "cpu.cfs_quota_us", strconv.FormatInt(quota, 10)})
		}
	}
	for _, s := range settings {
		if err := os.WriteFile(c.file(s[0], s[1]), []byte(s[2]), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Run calls start in a thread of its own that lies in the group, so that the
// process that it starts is born there. The thread ends with the call: start may
// restrict it, so that its child inherits that. fd is the group's directory in
// version 2, where processes are born in a group by clone itself, and -1 in version 1.
func (c *Group) Run(start func(fd int) error) error {
	fd, back := -1, []*os.File(nil)
	if c.parent.v2 {
		f, err := os.Open(c.parent.dirs(c.name)[0])
		if err != nil {
			return err
		}
		defer f.Close()
		fd = int(f.Fd())
	} else {
		// The thread goes back before it ends: the group must not wait for that.
		for _, dir := range c.parent.home {
			f, err := os.OpenFile(filepath.Join(dir, tasksName), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			back = append(back, f)
		}
	}
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		var err error
		if !c.parent.v2 {
			err = moveThread(c.parent.dirs(c.name))
		}
		if err == nil {
			err = start(fd)
		}
		for _, f := range back {
			_, werr := f.WriteString(strconv.Itoa(unix.Gettid()))
			err = errors.Join(err, werr)
		}
		errc <- err
	}()
	return <-errc
}

// tasksName is the file of a group of version 1 that threads are moved by.
const tasksName = "tasks"

// moveThread moves the calling thread into groups of version 1.
func moveThread(dirs []string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, tasksName), []byte(strconv.Itoa(unix.Gettid())), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// killAll ends every process of the group and waits until they are gone.
func (c *Group) killAll() error {
	for range 500 {
		pids, err := c.Pids()
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if pid == os.Getpid() {
				continue // a thread on its way back, see Run
			}
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("processes of control group %s do not end", c.name)
}

// Pids lists the group's processes; none when the group does not exist.
func (c *Group) Pids() ([]int, error) {
	f, err := os.Open(c.file("pids", "cgroup.procs"))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) { // ENODEV: it is just being removed
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var pids []int
	for s := bufio.NewScanner(f); s.Scan(); {
		if pid, err := strconv.Atoi(s.Text()); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Close removes the parent if no sandbox is left in it.
func (g *Parent) Close() {
	for _, dir := range g.dirs("") {
		_ = os.Remove(dir) // fails while groups are in it
	}
}

// Remove ends what is left in the group and removes it.
func (c *Group) Remove() error {
	if err := c.killAll(); err != nil {
		return err
	}
	var last error
	for _, dir := range c.parent.dirs(c.name) {
		// A dying process counts for a moment after it has left cgroup.procs.
		for range 200 {
			last = os.Remove(dir)
			if last == nil || errors.Is(last, os.ErrNotExist) {
				last = nil
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if last != nil {
			return last
		}
	}
	return nil
}

// OutOfMemory reports how often the kernel killed a process of the group for want of memory.
func (c *Group) OutOfMemory() int64 {
	if c.parent.v2 {
		return readKey(c.file("memory", "memory.events"), "oom_kill")
	}
	return readKey(c.file("memory", "memory.oom_control"), "oom_kill")
}

// Memory is the resident size in bytes, without file pages that can be dropped.
func (c *Group) Memory() int64 {
	usage, stat, inactive := "memory.usage_in_bytes", "memory.stat", "total_inactive_file"
	if c.parent.v2 {
		usage, inactive = "memory.current", "inactive_file"
	}
	return max(0, readInt(c.file("memory", usage))-readKey(c.file("memory", stat), inactive))
}

// CPU is the time consumed so far.
func (c *Group) CPU() time.Duration {
	if c.parent.v2 {
		return time.Duration(readKey(c.file("cpu", "cpu.stat"), "usage_usec")) * time.Microsecond
	}
	return time.Duration(readInt(c.file("cpuacct", "cpuacct.usage")))
}

// readInt reads a file that holds one number; 0 when it cannot.
func readInt(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// readKey reads one number of a file of "key value" lines; 0 when it cannot.
func readKey(path, key string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			n, _ := strconv.ParseInt(v, 10, 64)
			return n
		}
	}
	return 0
}
