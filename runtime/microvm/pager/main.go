package pager

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// argPager is the name under which this program is started to be a pager.
const argPager = "atoll-pager"

// IsReexec reports whether this process was started to be a pager. Such a process
// must call Main before it does anything else.
func IsReexec() bool { return os.Args[0] == argPager }

// Descriptors that a pager begins with.
const (
	fdOwner = 3 // a socket to its owner
	fdFiles = 4 // the first of the layers
)

// Messages are JSON. The owner sends one order, and then asks for a trace when it
// likes. The pager answers the order with one that is empty, beside which travels
// the descriptor of the memory, or that says what failed; later failures come
// unasked.
type (
	order struct {
		Size   int64    `json:"size"` // of the memory, bytes
		Layers []Layer  `json:"layers"`
		Plan   []uint32 `json:"plan"`            // pages to fetch ahead
		Wants  bool     `json:"wants,omitempty"` // a pipe for what is late comes after the layers
	}
	ask    struct{} // for the trace
	answer struct {
		Trace   []uint32 `json:"trace,omitempty"`
		Failed  string   `json:"failed,omitempty"`
		Damaged bool     `json:"damaged,omitempty"` // that is why it failed
	}
)

// Main runs the pager until nobody has its memory open. It never returns.
func Main() {
	_ = os.WriteFile("/proc/self/comm", []byte(argPager), 0)
	socket := os.NewFile(fdOwner, "owner")
	conn, err := net.FileConn(socket)
	socket.Close()
	owner, ok := conn.(*net.UnixConn)
	if err != nil || !ok {
		os.Exit(2)
	}
	p := &pager{owner: owner}
	if err := p.run(); err != nil {
		p.fail(err)
	}
	os.Exit(0)
}

// pager is the process that has the pages.
type pager struct {
	owner *net.UnixConn
	mu    sync.Mutex // held while an answer is written
}

// say sends an answer; the owner may be gone.
func (p *pager) say(a answer, rights []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := json.Marshal(a)
	if err != nil {
		return // it is of numbers and strings
	}
	n, _, err := p.owner.WriteMsgUnix(b, rights, nil)
	if err == nil && n < len(b) {
		_, _ = p.owner.Write(b[n:])
	}
}

// fail ends the process. Whoever touches a page that is not there yet is killed
// by the kernel: it never sees anything else in its place.
func (p *pager) fail(err error) {
	p.say(answer{Failed: err.Error(), Damaged: errors.Is(err, ErrDamaged)}, nil)
	os.Exit(1)
}

func (p *pager) run() error {
	in := json.NewDecoder(p.owner)
	var o order
	if err := in.Decode(&o); err != nil {
		return err
	}
	var layers []*os.File
	for i := range o.Layers {
		layers = append(layers, os.NewFile(uintptr(fdFiles+i), "layer"))
	}
	var wants *os.File
	if o.Wants {
		wants = os.NewFile(uintptr(fdFiles+len(o.Layers)), "wants")
	}
	m, err := newMemory(o.Size, o.Layers, layers, wants)
	if err != nil {
		return err
	}
	fs := newFiles(m, p.fail)
	server, file, err := mount(fs)
	if err != nil {
		return err
	}
	// What is needed first must not wait for what comes after it: the machine that
	// maps the memory takes longer to start than this.
	p.say(answer{}, unix.UnixRights(int(file.Fd())))
	go func() {
		defer file.Close() // it counted as a use until now
		m.announce(o.Plan)
		err := fs.fetch(o.Plan, func(offset int64, data []byte) fuse.Status {
			return server.InodeNotifyStoreCache(fileNode, offset, data)
		})
		if err != nil {
			p.fail(err)
		}
	}()
	go func() {
		for {
			var a ask
			if in.Decode(&a) != nil {
				return // the owner is gone; machines go on
			}
			p.say(answer{Trace: fs.trace()}, nil)
		}
	}()
	server.Wait()
	return nil
}

// mount makes the file system and opens its file. It is mounted nowhere any more
// when mount returns, so that the kernel ends it with its last user.
func mount(fs *files) (*fuse.Server, *os.File, error) {
	// This process has a mount namespace of its own, from which nothing gets out.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, nil, fmt.Errorf("make mounts private: %w", err)
	}
	const at = "/proc" // is there on every host, and this process needs nothing in it
	server, err := fuse.NewServer(fs, at, &fuse.MountOptions{
		AllowOther: true, DirectMountStrict: true, FsName: vmm.MemoryName, Name: "atoll",
		MaxReadAhead:  vmm.PageSize - 1, // in whole pages: none
		DisableXAttrs: true, IgnoreSecurityLabels: true,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("make a file system in user space: %w", err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return nil, nil, err
	}
	file, err := os.OpenFile(filepath.Join(at, vmm.MemoryName), os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
		return nil, nil, err
	}
	return server, file, nil
}
