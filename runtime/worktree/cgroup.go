package worktree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// cgroupRoot is where control groups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// v1Controllers are those that limit and measure sandboxes on hosts with the
// first version of control groups, each in a hierarchy of its own.
var v1Controllers = []string{"cpu", "cpuacct", "memory", "pids", "freezer"}

// cgroups is the place of one runtime's groups. All of a sandbox's groups lie at
// <hierarchy>/<prefix>/<id>. In the hierarchies that share out processes and CPU
// time, what the agent starts is in a group of its own below that, so that
// neither runs out for the agent however many processes there are.
type cgroups struct {
	prefix string
	v2     bool
}

// openCgroups makes the place, or says why this host or user cannot have one.
func openCgroups(prefix string) (*cgroups, error) {
	c := &cgroups{prefix: prefix}
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		c.v2 = true
	}
	return c, c.place()
}

// place makes the directories in which the groups of sandboxes lie, if they are
// missing.
func (c *cgroups) place() error {
	for _, dir := range c.hierarchies() {
		if !c.v2 && !mountPoint(dir) {
			return fmt.Errorf("the control group hierarchy %s is not mounted", dir)
		}
		if c.v2 {
			// Whoever came first has enabled them already; then this changes nothing.
			enable(dir)
		}
		if err := os.Mkdir(filepath.Join(dir, c.prefix), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if c.v2 {
			enable(filepath.Join(dir, c.prefix))
			have, err := os.ReadFile(filepath.Join(dir, c.prefix, "cgroup.subtree_control"))
			if err != nil {
				return err
			}
			for _, want := range []string{"cpu", "memory", "pids"} {
				if !slices.Contains(strings.Fields(string(have)), want) {
					return fmt.Errorf("the controller %s is not available", want)
				}
			}
		}
	}
	return nil
}

func enable(dir string) {
	for _, name := range []string{"+cpu", "+memory", "+pids"} {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(name), 0)
	}
}

func mountPoint(dir string) bool {
	var here, above unix.Stat_t
	return unix.Stat(dir, &here) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}

func (c *cgroups) hierarchies() []string {
	if c.v2 {
		return []string{cgroupRoot}
	}
	var dirs []string
	for _, name := range v1Controllers {
		dirs = append(dirs, filepath.Join(cgroupRoot, name))
	}
	return dirs
}

// path is a file of a sandbox's group; controller matters in version 1 only.
func (c *cgroups) path(id, controller, file string) string {
	if c.v2 {
		return filepath.Join(cgroupRoot, c.prefix, id, file)
	}
	return filepath.Join(cgroupRoot, controller, c.prefix, id, file)
}

const (
	// processesName is the group of what the agent starts, below a sandbox's.
	processesName = "processes"
	// reserve is how many processes and threads the sandbox's group may have
	// beyond the limit of processes: the agent's own threads, and commands that
	// are started while the limit is reached.
	reserve = 64
)

// splitControllers are those whose hierarchies have the group of processes.
var splitControllers = []string{"pids", "cpu"}

// processesDirs are the groups of what a sandbox's agent starts.
func (c *cgroups) processesDirs(id string) []string {
	if c.v2 {
		return []string{c.path(id, "", processesName)}
	}
	var dirs []string
	for _, controller := range splitControllers {
		dirs = append(dirs, c.path(id, controller, processesName))
	}
	return dirs
}

// split makes the groups of processes. In version 2 they are "threaded", for
// only such groups can hold a thread of the agent: the one that starts processes.
func (c *cgroups) split(id string, pids int) error {
	for _, dir := range c.processesDirs(id) {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if c.v2 {
		for _, controller := range splitControllers {
			if err := os.WriteFile(c.path(id, "", "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
				return err
			}
		}
		if err := os.WriteFile(c.path(id, "", processesName+"/cgroup.type"), []byte("threaded"), 0); err != nil {
			return err
		}
	}
	// The agent counts as one, by its thread in the group.
	return os.WriteFile(c.path(id, "pids", processesName+"/pids.max"), []byte(strconv.Itoa(pids)), 0)
}

// openProcesses opens the files by which a thread of the agent joins the groups
// of processes. The kernel asks who opened them, not who writes.
func (c *cgroups) openProcesses(id string) ([]*os.File, error) {
	name := "tasks"
	if c.v2 {
		name = "cgroup.threads"
	}
	var files []*os.File
	for _, dir := range c.processesDirs(id) {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// cpuPeriod is the time over which a CPU quota is given, in microseconds.
const cpuPeriod = 100_000

// create makes the groups of a sandbox with its limits.
func (c *cgroups) create(id string, res sandbox.Resources) error {
	if err := c.place(); err != nil { // somebody may have tidied up
		return err
	}
	for _, dir := range c.hierarchies() {
		if err := os.Mkdir(filepath.Join(dir, c.prefix, id), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	type setting struct {
		controller, v1, v2 string
		value1, value2     string
		optional           bool
	}
	pids := strconv.Itoa(res.Pids + reserve)
	settings := []setting{{"pids", "pids.max", "pids.max", pids, pids, false}}
	if res.Memory > 0 {
		limit := strconv.FormatInt(res.Memory, 10)
		settings = append(settings,
			setting{"memory", "memory.limit_in_bytes", "memory.max", limit, limit, false},
			// No way around the limit by swapping, where the kernel accounts swap.
			setting{"memory", "memory.memsw.limit_in_bytes", "memory.swap.max", limit, "0", true})
	}
	if res.CPUs > 0 {
		// The kernel takes no quota below 1 ms.
		quota := strconv.FormatInt(max(1000, int64(res.CPUs*cpuPeriod)), 10)
		settings = append(settings,
			setting{"cpu", "cpu.cfs_quota_us", "cpu.max", quota, fmt.Sprintf("%s %d", quota, cpuPeriod), false})
	}
	for _, s := range settings {
		file, value := s.v1, s.value1
		if c.v2 {
			file, value = s.v2, s.value2
		}
		if err := os.WriteFile(c.path(id, s.controller, file), []byte(value), 0); err != nil && !s.optional {
			return err
		}
	}
	return c.split(id, res.Pids)
}

// add puts a process, and all that it will start, into the groups.
func (c *cgroups) add(id string, pid int) error {
	for _, dir := range c.hierarchies() {
		if err := os.WriteFile(filepath.Join(dir, c.prefix, id, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return err
		}
	}
	return nil
}

// freeze stops or continues every process, and returns when it is so.
func (c *cgroups) freeze(ctx context.Context, id string, frozen bool) error {
	file, value, want := "freezer.state", "THAWED", "THAWED"
	if frozen {
		value, want = "FROZEN", "FROZEN"
	}
	check := file
	if c.v2 {
		file, value, check, want = "cgroup.freeze", "0", "cgroup.events", "frozen 0"
		if frozen {
			value, want = "1", "frozen 1"
		}
	}
	for {
		// In version 1 a process forked at the wrong moment needs a second call.
		if err := os.WriteFile(c.path(id, "freezer", file), []byte(value), 0); err != nil {
			return err
		}
		text, err := os.ReadFile(c.path(id, "freezer", check))
		if err != nil {
			return err
		}
		if strings.Contains(string(text), want) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// usage reads what a sandbox uses.
func (c *cgroups) usage(id string) (s sandbox.Stats) {
	if c.v2 {
		s.CPU = time.Duration(c.field(id, "cpu", "cpu.stat", "usage_usec")) * time.Microsecond
		s.Memory = c.number(id, "memory", "memory.current") - c.field(id, "memory", "memory.stat", "inactive_file")
	} else {
		s.CPU = time.Duration(c.number(id, "cpuacct", "cpuacct.usage"))
		s.Memory = c.number(id, "memory", "memory.usage_in_bytes") - c.field(id, "memory", "memory.stat", "total_inactive_file")
	}
	s.Memory = max(s.Memory, 0)
	s.Pids = int(c.number(id, "pids", processesName+"/pids.current"))
	return s
}

// oomKills counts the processes that died for want of memory.
func (c *cgroups) oomKills(id string) int64 {
	file := "memory.oom_control"
	if c.v2 {
		file = "memory.events"
	}
	return c.field(id, "memory", file, "oom_kill")
}

// number reads a file that holds one number; 0 when there is none.
func (c *cgroups) number(id, controller, file string) int64 {
	text, err := os.ReadFile(c.path(id, controller, file))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n
}

// field reads one line "name number" of a file; 0 when there is none.
func (c *cgroups) field(id, controller, file, name string) int64 {
	text, err := os.ReadFile(c.path(id, controller, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
			return n
		}
	}
	return 0
}

// kill ends every process of a sandbox, also of one that is frozen.
func (c *cgroups) kill(id string) {
	for range 1000 { // bounds the race with a fork bomb; its PIDs are limited
		text, _ := os.ReadFile(c.path(id, "freezer", "cgroup.procs")) // nothing there is split
		pids := strings.Fields(string(text))
		if len(pids) == 0 {
			return
		}
		for _, field := range pids {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		// A frozen process dies when it thaws.
		if c.v2 {
			_ = os.WriteFile(c.path(id, "freezer", "cgroup.freeze"), []byte("0"), 0)
		} else {
			_ = os.WriteFile(c.path(id, "freezer", "freezer.state"), []byte("THAWED"), 0)
		}
		time.Sleep(time.Millisecond)
	}
}

// remove removes the groups of a sandbox whose processes were killed. The
// kernel takes a moment to let go of them.
func (c *cgroups) remove(id string) error {
	groups := c.processesDirs(id)
	for _, dir := range c.hierarchies() {
		groups = append(groups, filepath.Join(dir, c.prefix, id))
	}
	for _, group := range groups {
		for i := 0; ; i++ {
			err := os.Remove(group)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			if i == 2000 {
				return err
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// close removes the place of the groups if there are none in it.
func (c *cgroups) close() {
	for _, dir := range c.hierarchies() {
		_ = os.Remove(filepath.Join(dir, c.prefix)) // the kernel keeps it while it is in use
	}
}

// list returns the IDs that have groups.
func (c *cgroups) list() []string {
	entries, _ := os.ReadDir(filepath.Join(c.hierarchies()[0], c.prefix))
	var ids []string
	for _, e := range entries {
		if e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids
}
