package server

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"
)

// procStat is what /proc/PID/stat tells of a process.
type procStat struct {
	pid, parent, session int
	zombie               bool
	cpu                  time.Duration // user and system time
}

// clockTick is the unit of CPU times in /proc, fixed on Linux.
const clockTick = 10 * time.Millisecond

// processTable reads /proc. Processes that end meanwhile are left out.
func processTable() []procStat {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var table []procStat
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		text, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		if p, ok := parseStat(text); ok {
			table = append(table, p)
		}
	}
	return table
}

// parseStat reads one line of /proc/PID/stat. The command in parentheses may
// itself hold parentheses and spaces, so the fields start after the last one.
func parseStat(text []byte) (procStat, bool) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 1 || end < open {
		return procStat{}, false
	}
	f := strings.Fields(string(text[end+1:]))
	if len(f) < 13 {
		return procStat{}, false
	}
	var p procStat
	var utime, stime int64
	for _, field := range []struct {
		text string
		to   *int
	}{{strings.TrimSpace(string(text[:open])), &p.pid}, {f[1], &p.parent}, {f[3], &p.session}} {
		n, err := strconv.Atoi(field.text)
		if err != nil {
			return procStat{}, false
		}
		*field.to = n
	}
	utime, _ = strconv.ParseInt(f[11], 10, 64)
	stime, _ = strconv.ParseInt(f[12], 10, 64)
	p.zombie = f[0] == "Z"
	p.cpu = time.Duration(utime+stime) * clockTick
	return p, true
}

// descendants returns the live processes below root, root left out.
func descendants(table []procStat, root int) []int {
	children := map[int][]procStat{}
	for _, p := range table {
		children[p.parent] = append(children[p.parent], p)
	}
	var pids []int
	seen := map[int]bool{root: true} // a table read piecemeal may hold a cycle
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		for _, p := range children[queue[0]] {
			if seen[p.pid] {
				continue
			}
			seen[p.pid] = true
			queue = append(queue, p.pid)
			if !p.zombie {
				pids = append(pids, p.pid)
			}
		}
	}
	return pids
}
