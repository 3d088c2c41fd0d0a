// Package pager serves the memory of restored machines page by page, so that they
// run before all of it was read.
//
// A pager is a process of its own, a copy of this program, since machines outlive
// the daemon. It makes a file system in user space (FUSE) with one file, which
// monitors map privately just as they map a memfd: the kernel keeps one copy of each
// page for all of them and asks the pager for a page when it is touched first. Each
// piece of the files behind it is checked when it is read. The pager knows thereby
// which pages a restore touches, and in what order; and it gives pages to the kernel
// ahead of need, by the plan that was learned from restores before.
//
// A pager ends when nobody has its memory open any more. One that is killed, or
// that finds its files damaged, takes the machines with it: the kernel kills who
// touches what is not there.
package pager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/process"
)

// answerTimeout bounds how long a pager may take to answer its owner.
const answerTimeout = 20 * time.Second

// Pager is a pager that runs. Its methods may be called from many goroutines.
type Pager struct {
	Memory  *os.File         // what monitors map privately; nil for an adopted one
	Process *process.Process // which a later owner finds again
	Group   *cgroup.Group    // in which it runs; removed when it has ended

	conn   *net.UnixConn // nil for an adopted one
	traces chan []uint32
	ended  chan struct{}
	stop   context.CancelFunc

	mu     sync.Mutex
	failed error // what it said before it ended
}

// The bounds of a pager's group: its own memory in bytes, beyond the pages that it
// gives to the kernel ahead of need, and its threads.
const (
	ownMemory = 64 << 20
	tasks     = 64
)

// Start starts a pager in a group, which must not exist yet, for a memory of size
// bytes made of layers in files, each upon the ones before. It fetches the pages of
// plan ahead, in that order. The error wraps ErrDamaged when files are not what
// their sums say, as far as they were read. wants is the pipe on which late layers
// are asked for; nil: there are none.
func Start(group *cgroup.Group, size int64, layers []Layer, files []*os.File, plan []uint32, wants *os.File) (*Pager, error) {
	if wants != nil {
		files = append(slices.Clone(files), wants)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "pager"), os.NewFile(uintptr(pair[1]), "owner")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	p := &Pager{Group: group, conn: conn.(*net.UnixConn), traces: make(chan []uint32, 1), ended: make(chan struct{})}
	if err := p.spawn(size, append([]*os.File{theirs}, files...)); err != nil {
		return nil, errors.Join(fmt.Errorf("start a pager: %w", err), conn.Close(), group.Remove())
	}
	theirs.Close()
	if err := p.begin(order{size, layers, plan, wants != nil}); err != nil {
		return nil, errors.Join(fmt.Errorf("start a pager: %w", err), p.Process.Kill(), conn.Close(), group.Remove())
	}
	p.watch()
	return p, nil
}

// spawn starts the process with files from descriptor 3 on.
func (p *Pager) spawn(size int64, files []*os.File) error {
	if err := p.Group.Create(); err != nil {
		return err
	}
	if err := p.Group.Limit(cgroup.Limits{Memory: size + ownMemory, Tasks: tasks}); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{argPager}
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	return p.Group.Run(func(groupFD int) (err error) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC}
		if groupFD >= 0 {
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, groupFD
		}
		p.Process, err = process.Start(cmd)
		return err
	})
}

// begin gives the order and takes the memory.
func (p *Pager) begin(o order) error {
	if err := p.conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	if err := json.NewEncoder(p.conn).Encode(o); err != nil {
		return err
	}
	text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, nr, _, _, err := p.conn.ReadMsgUnix(text, rights)
	if err != nil {
		return err
	}
	var a answer
	if err := json.Unmarshal(text[:n], &a); err != nil {
		return fmt.Errorf("it ended or answered nonsense: %w", err)
	}
	if a.Failed != "" {
		return a.err()
	}
	messages, err := unix.ParseSocketControlMessage(rights[:nr])
	if err != nil || len(messages) != 1 {
		return errors.Join(errors.New("it sent no memory"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return errors.Join(errors.New("it sent no memory"), err)
	}
	unix.CloseOnExec(fds[0])
	p.Memory = os.NewFile(uintptr(fds[0]), "memory")
	return p.conn.SetDeadline(time.Time{})
}

// err is what failed.
func (a answer) err() error {
	if a.Damaged {
		return fmt.Errorf("%s (%w)", a.Failed, ErrDamaged)
	}
	return errors.New(a.Failed)
}

// watch waits for answers and for the end.
func (p *Pager) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		if p.conn == nil {
			return
		}
		for in := json.NewDecoder(p.conn); ; {
			var a answer
			if in.Decode(&a) != nil {
				return
			}
			if a.Failed != "" {
				p.mu.Lock()
				p.failed = a.err()
				p.mu.Unlock()
				return
			}
			select {
			case p.traces <- a.Trace:
			default: // nobody waits for it any more
			}
		}
	}()
	go func() {
		if p.Process.Wait(ctx) != nil {
			return // let go
		}
		if p.conn != nil {
			<-heard // its last words
		}
		_ = p.Group.Remove() // else the next owner does
		close(p.ended)
	}()
}

// Adopt takes hold of a pager that an earlier process started in a group, or
// fails when it is gone.
func Adopt(group *cgroup.Group, p *process.Process) (*Pager, error) {
	if err := p.Open(); err != nil {
		return nil, fmt.Errorf("the process that held the machine's memory is gone: %w", err)
	}
	a := &Pager{Process: p, Group: group, ended: make(chan struct{})}
	a.watch()
	return a, nil
}

// Ended is closed when the process has ended. Machines that still map its memory
// cannot go on.
func (p *Pager) Ended() <-chan struct{} { return p.ended }

// Cause says why the process ended, nil as long as it did not say.
func (p *Pager) Cause() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

// Trace returns the pages that were asked for so far, in their order, and ends the
// recording. Pages that were fetched ahead of need are not asked for.
func (p *Pager) Trace(ctx context.Context) ([]uint32, error) {
	if p.conn == nil {
		return nil, errors.New("an adopted pager tells no trace")
	}
	if err := json.NewEncoder(p.conn).Encode(ask{}); err != nil {
		return nil, err
	}
	select {
	case t := <-p.traces:
		return t, nil
	case <-p.ended:
		return nil, errors.Join(errors.New("the pager ended"), p.Cause())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// End waits until the process has ended, which it does when nobody but its owner
// has its memory open, or kills it.
func (p *Pager) End(ctx context.Context) error {
	p.shut()
	select {
	case <-p.ended:
	case <-ctx.Done():
		if err := p.Process.Kill(); err != nil {
			return err
		}
		<-p.ended
	}
	p.stop()
	return p.Process.Close()
}

// Close lets the pager go: it ends when nobody has its memory open any more.
func (p *Pager) Close() error {
	p.stop()
	p.shut()
	return p.Process.Close()
}

// shut closes what the owner has of it.
func (p *Pager) shut() {
	if p.Memory != nil {
		p.Memory.Close()
	}
	if p.conn != nil {
		p.conn.Close()
	}
}
