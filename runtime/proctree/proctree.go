// Package proctree stops, continues, ends and measures processes together with all
// that they started, where no control group can do it.
package proctree

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

// Process is what /proc tells of one.
type Process struct {
	PID, Parent int
	State       byte          // 'Z': ended but not collected
	CPU         time.Duration // its own and that of children it collected
	Memory      int64         // bytes resident
}

// clockTick is the unit of CPU times in /proc, fixed on Linux.
const clockTick = 10 * time.Millisecond

// Of returns the process and all below it. It misses orphans unless the root
// adopts them, as the first process of a namespace and a subreaper do.
func Of(root int) []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	children := map[int][]Process{}
	var found []Process
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		text, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // ended meanwhile
		}
		p, ok := parseStat(text)
		switch {
		case !ok:
		case p.PID == root:
			found = append(found, p)
		default:
			children[p.Parent] = append(children[p.Parent], p)
		}
	}
	for i := 0; i < len(found); i++ {
		next := children[found[i].PID]
		delete(children, found[i].PID) // so that a cycle, read piecemeal, ends
		found = append(found, next...)
	}
	return found
}

// parseStat reads one line of /proc/PID/stat. The command in parentheses may
// hold anything, so the fields are counted from the last parenthesis.
func parseStat(text []byte) (p Process, ok bool) {
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return p, false
	}
	f := bytes.Fields(text[end+1:])
	if len(f) < 22 {
		return p, false
	}
	number := func(text []byte) int64 {
		n, _ := strconv.ParseInt(string(text), 10, 64)
		return n
	}
	head, _, _ := bytes.Cut(text, []byte(" "))
	p.PID, p.State, p.Parent = int(number(head)), f[0][0], int(number(f[1]))
	for _, ticks := range f[11:15] {
		p.CPU += time.Duration(number(ticks)) * clockTick
	}
	p.Memory = number(f[21]) * int64(os.Getpagesize())
	return p, p.PID > 0
}

// rounds bounds how often a tree is looked at again for processes that were
// started meanwhile.
const rounds = 1000

// Signal sends SIGSTOP or SIGCONT to a whole tree: stopped processes start
// no others, so it looks again until it finds nothing new.
func Signal(root int, sig syscall.Signal) error {
	done := map[int]bool{}
	for range rounds {
		news := false
		for _, p := range Of(root) {
			if p.State != 'Z' && !done[p.PID] {
				done[p.PID], news = true, true
				if err := syscall.Kill(p.PID, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
					return err
				}
			}
		}
		if !news {
			return nil
		}
	}
	return fmt.Errorf("processes are started faster than they can be stopped")
}

// Kill kills a whole tree, its root last: it must adopt the orphans until then.
func Kill(root int) {
	_ = Signal(root, syscall.SIGSTOP)
	for range rounds {
		left := false
		for _, p := range Of(root) {
			if p.PID != root && p.State != 'Z' {
				left = true
				_ = syscall.Kill(p.PID, syscall.SIGKILL)
			}
		}
		if !left {
			break
		}
	}
	_ = syscall.Kill(root, syscall.SIGKILL)
}
