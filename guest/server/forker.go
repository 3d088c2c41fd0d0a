package server

import (
	"os"
	"runtime"
	"syscall"
)

// forker starts processes from a thread of ours that has joined control groups
// of its own, so that they are born there and can never be missed: not the rest
// of the agent, which they must not starve.
type forker struct {
	requests chan func()
}

// newForker starts the thread. A group that cannot be joined is left out: its
// limit then holds for the agent and its processes together.
func newForker(groups []*os.File) *forker {
	f := &forker{requests: make(chan func())}
	go func() {
		runtime.LockOSThread() // for ever; Go starts no thread of its own from such a one
		for _, g := range groups {
			_, _ = g.WriteString("0") // this thread
		}
		for do := range f.requests {
			do()
		}
	}()
	return f
}

// fork is syscall.ForkExec on the forker's thread.
func (f *forker) fork(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	done := make(chan struct{})
	f.requests <- func() {
		defer close(done)
		pid, err = syscall.ForkExec(path, argv, attr)
	}
	<-done
	return pid, err
}
