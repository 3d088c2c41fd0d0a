package server

import (
	"bytes"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
)

// metrics answers GET /metrics.
func (s *Server) metrics(w http.ResponseWriter, _ *http.Request) {
	m := wire.Metrics{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU()}
	m.CPUUsedPct = s.cpu.percent(cpuTime(), time.Now(), m.CPUCount)
	m.MemTotal, m.MemUsed, m.MemCache = memory()
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	var st unix.Statfs_t
	if unix.Statfs("/", &st) == nil {
		m.DiskTotal = st.Blocks * uint64(st.Bsize)
		m.DiskUsed = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	writeJSON(w, m)
}

// cpuMeter turns a growing counter of CPU time into a percentage.
type cpuMeter struct {
	mu   sync.Mutex
	used time.Duration
	at   time.Time // zero before the first reading
}

// percent returns the share of all CPUs used since the previous call.
func (c *cpuMeter) percent(used time.Duration, now time.Time, cpus int) float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	delta, elapsed := used-c.used, now.Sub(c.at)
	first := c.at.IsZero()
	c.used, c.at = used, now
	// The counter falls when processes end where it is summed over processes.
	if first || elapsed <= 0 || delta < 0 {
		return 0
	}
	pct := 100 * delta.Seconds() / elapsed.Seconds() / float64(cpus)
	return math.Round(min(pct, 100)*100) / 100
}

// cpuTime is the CPU time that the sandbox has used: from its cgroup, else from
// the machine's counters, else summed over the processes there are.
func cpuTime() time.Duration {
	if text, ok := cgroupFile("cpu", "cpu.stat"); ok {
		if n, ok := field(text, "usage_usec"); ok {
			return time.Duration(n) * time.Microsecond
		}
	}
	if text, ok := cgroupFile("cpuacct", "cpuacct.usage"); ok {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil {
			return time.Duration(n)
		}
	}
	if text, err := os.ReadFile("/proc/stat"); err == nil {
		if busy := busyTime(text); busy > 0 {
			return busy
		}
	}
	var sum time.Duration
	for _, p := range processTable() {
		sum += p.cpu
	}
	return sum
}

// busyTime adds up the first line of /proc/stat but for idle and iowait. The
// last two columns, guest time, are already part of the first two.
func busyTime(stat []byte) time.Duration {
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 5 || f[0] != "cpu" {
		return 0
	}
	var ticks int64
	for i, text := range f[1:min(len(f), 9)] {
		if n, err := strconv.ParseInt(text, 10, 64); err == nil && i != 3 && i != 4 {
			ticks += n
		}
	}
	return time.Duration(ticks) * clockTick
}

// memory returns the sandbox's memory in bytes: in all, in use without caches,
// and caches. A cgroup limit below the machine's memory counts as all.
func memory() (total, used, cache uint64) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, 0
	}
	kib := func(name string) uint64 {
		n, _ := field(text, name+":")
		return uint64(max(n, 0)) << 10
	}
	total, cache = kib("MemTotal"), kib("Cached")+kib("Buffers")
	if available := kib("MemAvailable"); available <= total {
		used = total - available
	}
	for _, f := range []struct{ controller, limit, usage, cached string }{
		{"memory", "memory.max", "memory.current", "file"},
		{"memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"},
	} {
		limit, ok1 := cgroupNumber(f.controller, f.limit)
		usage, ok2 := cgroupNumber(f.controller, f.usage)
		if !ok1 || !ok2 || limit >= total {
			continue
		}
		total, used, cache = limit, usage, 0
		if stat, ok := cgroupFile("memory", "memory.stat"); ok {
			if n, ok := field(stat, f.cached); ok && uint64(n) <= usage {
				cache, used = uint64(n), usage-uint64(n)
			}
		}
	}
	return total, used, cache
}

// field finds the number after a name at the beginning of a line.
func field(text []byte, name string) (int64, bool) {
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) >= 2 && f[0] == name {
			n, err := strconv.ParseInt(f[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

func cgroupNumber(controller, name string) (uint64, bool) {
	text, ok := cgroupFile(controller, name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64) // "max": no limit
	return n, err == nil
}

// cgroupFile reads a file of our cgroup, in version 2 or version 1.
func cgroupFile(controller, name string) ([]byte, bool) {
	for _, path := range cgroupPaths(controller, name) {
		if text, err := os.ReadFile(path); err == nil {
			return text, true
		}
	}
	return nil, false
}

// cgroupPaths returns where a file of our cgroup may be.
func cgroupPaths(controller, name string) []string {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	var paths []string
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		dir := "/sys/fs/cgroup"
		if f[1] != "" {
			if !slices.Contains(strings.Split(f[1], ","), controller) {
				continue
			}
			dir = filepath.Join(dir, controller)
		}
		// The path is relative to a root that may not be mounted here: then the
		// mount shows our own cgroup.
		paths = append(paths, filepath.Join(dir, f[2], name), filepath.Join(dir, name))
	}
	return paths
}

// oomCounter counts the processes of the sandbox that the kernel has killed for
// want of memory. It keeps its file open, since it is read at every start.
type oomCounter struct{ f *os.File } // nil where the kernel does not tell

func openOOMCounter() oomCounter {
	paths := append(cgroupPaths("memory", "memory.events"), cgroupPaths("memory", "memory.oom_control")...)
	for _, path := range append(paths, "/proc/vmstat") {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		c := oomCounter{f}
		if _, ok := c.read(); ok {
			return c
		}
		f.Close()
	}
	return oomCounter{}
}

// read returns the count.
func (c oomCounter) read() (int64, bool) {
	if c.f == nil {
		return 0, false
	}
	var text [16 << 10]byte // /proc/vmstat is the largest
	n, _ := c.f.ReadAt(text[:], 0)
	return field(text[:n], "oom_kill")
}
