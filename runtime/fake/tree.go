package fake

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

// process is what /proc tells of one.
type process struct {
	pid, parent int
	state       byte          // 'Z': ended but not collected
	cpu         time.Duration // its own and that of children it collected
	memory      int64         // bytes resident
}

// clockTick is the unit of CPU times in /proc, fixed on Linux.
const clockTick = 10 * time.Millisecond

// tree returns the process and all below it. The agent adopts the orphans of
// its sandbox, so this is all of them.
func tree(root int) []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	children := map[int][]process{}
	var found []process
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
		case p.pid == root:
			found = append(found, p)
		default:
			children[p.parent] = append(children[p.parent], p)
		}
	}
	for i := 0; i < len(found); i++ {
		next := children[found[i].pid]
		delete(children, found[i].pid) // so that a cycle, read piecemeal, ends
		found = append(found, next...)
	}
	return found
}

// parseStat reads one line of /proc/PID/stat. The command in parentheses may
// hold anything, so the fields are counted from the last parenthesis.
func parseStat(text []byte) (p process, ok bool) {
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
	p.pid, p.state, p.parent = int(number(head)), f[0][0], int(number(f[1]))
	for _, ticks := range f[11:15] {
		p.cpu += time.Duration(number(ticks)) * clockTick
	}
	p.memory = number(f[21]) * int64(os.Getpagesize())
	return p, p.pid > 0
}

// rounds bounds how often a tree is looked at again for processes that were
// started meanwhile.
const rounds = 1000

// signalTree sends SIGSTOP or SIGCONT to a whole tree: stopped processes start
// no others, so it looks again until it finds nothing new.
func signalTree(root int, sig syscall.Signal) error {
	done := map[int]bool{}
	for range rounds {
		news := false
		for _, p := range tree(root) {
			if p.state != 'Z' && !done[p.pid] {
				done[p.pid], news = true, true
				if err := syscall.Kill(p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
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

// killTree kills a whole tree, its root last: it must adopt the orphans until then.
func killTree(root int) {
	_ = signalTree(root, syscall.SIGSTOP)
	for range rounds {
		left := false
		for _, p := range tree(root) {
			if p.pid != root && p.state != 'Z' {
				left = true
				_ = syscall.Kill(p.pid, syscall.SIGKILL)
			}
		}
		if !left {
			break
		}
	}
	_ = syscall.Kill(root, syscall.SIGKILL)
}
