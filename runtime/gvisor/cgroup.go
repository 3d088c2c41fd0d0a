package gvisor

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

const cgroupRoot = "/sys/fs/cgroup"

// controllers are those that bound a sandbox. In version 1 each is a tree of its own.
var controllers = []string{"cpu", "cpuacct", "memory", "pids"}

// sentryOverhead is what a sandbox may use beyond its own memory, in bytes: the
// sentry's heap, page tables and the guest agent's image.
const sentryOverhead = 48 << 20

// groupWeight is how much more processor time the group of all sandboxes gets than
// a neighbour when both want it. To its neighbours, single processes among them,
// it is one group however many sandboxes are in it.
const groupWeight = 16

// groups is the parent of all control groups of one runtime.
type groups struct {
	prefix string
	v2     bool
	home   []string // version 1: the directories of the groups in which this process is
}

// group is the control group of one sandbox.
type group struct {
	parent *groups
	name   string
}

// openGroups makes the parent group.
func openGroups(prefix string) (*groups, error) {
	const op = "gvisor.New"
	g := &groups{prefix: prefix}
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return nil, sandbox.E(op, sandbox.Denied, cgroupRoot, err).WithHint("mount the cgroup file system")
	}
	g.v2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	for _, dir := range g.dirs("") {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, sandbox.E(op, sandbox.Denied, dir, err).
				WithHint("gVisor needs a writable cgroup tree with the cpu, memory and pids controllers")
		}
	}
	if !g.v2 {
		if err := os.WriteFile(g.group("").file("cpu", "cpu.shares"), []byte(strconv.Itoa(1024*groupWeight)), 0o644); err != nil {
			return nil, sandbox.E(op, sandbox.Denied, prefix, err)
		}
		var err error
		g.home, err = homeGroups()
		return g, err
	}
	for _, dir := range []string{cgroupRoot, filepath.Join(cgroupRoot, prefix)} {
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0o644)
		if err != nil {
			return nil, sandbox.E(op, sandbox.Denied, dir, err).
				WithHint("the cpu, memory and pids controllers must be available to child groups")
		}
	}
	if err := os.WriteFile(g.group("").file("cpu", "cpu.weight"), []byte(strconv.Itoa(100*groupWeight)), 0o644); err != nil {
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
				dirs = append(dirs, filepath.Join(cgroupRoot, c, parts[2]))
			}
		}
	}
	return dirs, nil
}

// dirs returns the directories of a group: one in version 2, one a controller in version 1.
func (g *groups) dirs(name string) []string {
	if g.v2 {
		return []string{filepath.Join(cgroupRoot, g.prefix, name)}
	}
	dirs := make([]string, len(controllers))
	for i, c := range controllers {
		dirs[i] = filepath.Join(cgroupRoot, c, g.prefix, name)
	}
	return dirs
}

// list returns the names of all groups that exist.
func (g *groups) list() []string {
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

func (g *groups) group(name string) *group { return &group{parent: g, name: name} }

// file is the path of a control file; controller is looked at in version 1 only.
func (c *group) file(controller, name string) string {
	if c.parent.v2 {
		return filepath.Join(cgroupRoot, c.parent.prefix, c.name, name)
	}
	return filepath.Join(cgroupRoot, controller, c.parent.prefix, c.name, name)
}

// create makes the group.
func (c *group) create() error {
	for _, dir := range c.parent.dirs(c.name) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// limit sets the bounds. The group holds the sentry, its stubs and the gofer, so
// the number of host processes is bounded more widely than res.Pids says; within
// that, the sentry itself counts processes, see processLimits.
func (c *group) limit(res sandbox.Resources) error {
	const period = 100_000 // µs
	settings := [][3]string{{"pids", "pids.max", strconv.Itoa(hostTasks(res.Pids))}}
	memory := strconv.FormatInt(res.Memory+sentryOverhead, 10)
	if c.parent.v2 {
		settings = append(settings, [3]string{"memory", "memory.max", memory})
		if res.CPUs > 0 {
			quota := int64(math.Ceil(res.CPUs * period))
			settings = append(settings, [3]string{"cpu", "cpu.max", fmt.Sprintf("%d %d", quota, period)})
		}
	} else {
		settings = append(settings, [3]string{"memory", "memory.limit_in_bytes", memory})
		if res.CPUs > 0 {
			quota := int64(math.Ceil(res.CPUs * period))
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

// hostTasks bounds the host's tasks of a sandbox: systrap keeps one stub process
// for every address space with several stub threads, and the sentry has threads
// of its own. A sentry that reaches this bound stands still, so it is far above
// what the processes that the sentry allows can need.
func hostTasks(pids int) int { return min(32*pids+1024, 1<<20) }

// run calls start in a thread that lies in the group, so that the process that
// it starts is born there. fd is the group's directory in version 2, where
// processes are born in a group by clone itself, and -1 in version 1.
func (c *group) run(start func(fd int) error) error {
	if c.parent.v2 {
		f, err := os.Open(c.parent.dirs(c.name)[0])
		if err != nil {
			return err
		}
		defer f.Close()
		return start(int(f.Fd()))
	}
	errc := make(chan error, 1)
	go func() {
		// Only this thread moves. Should it not come back, it ends with the goroutine.
		runtime.LockOSThread()
		err := moveThread(c.parent.dirs(c.name))
		if err == nil {
			err = start(-1)
		}
		if back := moveThread(c.parent.home); back != nil {
			errc <- errors.Join(err, back)
			return
		}
		runtime.UnlockOSThread()
		errc <- err
	}()
	return <-errc
}

// moveThread moves the calling thread into groups of version 1.
func moveThread(dirs []string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "tasks"), []byte(strconv.Itoa(unix.Gettid())), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// killAll ends every process of the group and waits until they are gone.
func (c *group) killAll() error {
	for range 500 {
		pids, err := c.pids()
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if pid == os.Getpid() {
				continue // a thread on its way back, see run
			}
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("processes of control group %s do not end", c.name)
}

// pids lists the group's processes; none when the group does not exist.
func (c *group) pids() ([]int, error) {
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

// close removes the parent if no sandbox is left in it.
func (g *groups) close() {
	for _, dir := range g.dirs("") {
		_ = os.Remove(dir) // fails while groups are in it
	}
}

// remove ends what is left in the group and removes it.
func (c *group) remove() error {
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

// outOfMemory reports how often the kernel killed a process of the group for want of memory.
func (c *group) outOfMemory() int64 {
	if c.parent.v2 {
		return readKey(c.file("memory", "memory.events"), "oom_kill")
	}
	return readKey(c.file("memory", "memory.oom_control"), "oom_kill")
}

// memory is the resident size in bytes, without file pages that can be dropped.
func (c *group) memory() int64 {
	usage, stat, inactive := "memory.usage_in_bytes", "memory.stat", "total_inactive_file"
	if c.parent.v2 {
		usage, inactive = "memory.current", "inactive_file"
	}
	return max(0, readInt(c.file("memory", usage))-readKey(c.file("memory", stat), inactive))
}

// cpu is the time consumed so far.
func (c *group) cpu() time.Duration {
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
