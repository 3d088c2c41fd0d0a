package server

import (
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// The kernel kills processes with a high oom_score_adj first. The agent protects
// itself and gives its children the normal score; where it may not, it keeps its
// score and gives its children a higher one.
const (
	oomProtected = -900
	oomNormal    = 0
	oomExposed   = 500
)

// reaper starts processes and collects every one that ends: those it started,
// and orphans that the kernel hands to us as PID 1 or subreaper. One wait loop
// for all means that no exit status is lost to another waiter.
type reaper struct {
	mu       sync.Mutex // held over fork and over wait, so that a child is known before it is collected
	children map[int]*child
	outside  *forker  // starts processes in their own control group; nil: they share the agent's
	oom      *os.File // /proc/self/oom_score_adj; nil where there is none
	oomOwn   int      // the agent's score
	oomChild int      // its children's
}

// child is a process that we started.
type child struct {
	pid    int
	done   chan struct{}      // closed when it was collected
	status syscall.WaitStatus // valid once done is closed
}

// newReaper takes over the process's children. There must be one at most. The
// groups are those of Config.
func newReaper(groups []*os.File) *reaper {
	r := &reaper{children: map[int]*child{}}
	if len(groups) > 0 {
		r.outside = newForker(groups)
	}
	r.protect()
	// One slot is enough: a signal that finds it full is about to be handled.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	go func() {
		for range signals {
			r.collect()
		}
	}()
	return r
}

// protect decides who is killed first when memory runs out.
func (r *reaper) protect() {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		return
	}
	var text [16]byte
	n, _ := f.ReadAt(text[:], 0)
	own, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil {
		f.Close()
		return
	}
	r.oom, r.oomOwn, r.oomChild = f, own, max(own, oomExposed)
	if r.setOOM(oomProtected) {
		r.oomOwn, r.oomChild = oomProtected, oomNormal
	}
}

func (r *reaper) setOOM(score int) bool {
	_, err := r.oom.WriteAt([]byte(strconv.Itoa(score)), 0)
	return err == nil
}

// collect waits for all processes that have ended.
func (r *reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if c, ok := r.children[pid]; ok {
			delete(r.children, pid)
			c.status = status
			close(c.done)
		}
	}
}

// spawn starts a process that leads its own session.
func (r *reaper) spawn(path string, argv []string, attr *syscall.ProcAttr) (*child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.oom != nil {
		// The score is inherited: give the child, and whatever it forks, theirs
		// by having it ourselves for the moment of the fork.
		r.setOOM(r.oomChild)
		defer r.setOOM(r.oomOwn)
	}
	fork := syscall.ForkExec
	if r.outside != nil {
		fork = r.outside.fork
	}
	pid, err := fork(path, argv, attr)
	if errors.Is(err, syscall.EAGAIN) && r.outside != nil {
		// Their group is full. Whoever wants to see to that needs a process: it
		// gets one of those that are reserved for us.
		pid, err = syscall.ForkExec(path, argv, attr)
	}
	if err != nil {
		return nil, err
	}
	c := &child{pid: pid, done: make(chan struct{})}
	r.children[pid] = c
	return c, nil
}

// signal sends sig to the process and its group. It fails with ESRCH once the
// process was collected, so a reused PID is never hit.
func (r *reaper) signal(c *child, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[c.pid]; !ok {
		return syscall.ESRCH
	}
	err := syscall.Kill(-c.pid, sig)
	if sig == syscall.SIGKILL {
		// Job control gives the jobs of an interactive shell groups of their
		// own; the session still tells that they belong to it.
		for _, p := range processTable() {
			if p.session == c.pid && p.pid != c.pid {
				_ = syscall.Kill(p.pid, sig)
			}
		}
	}
	return err
}
