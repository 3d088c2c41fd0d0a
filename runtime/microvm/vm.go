package microvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/serial"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/kernel"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

// vm is one machine with all that it needs of its host.
type vm struct {
	dir     string
	group   *cgroup.Group
	machine vmm.Machine
	tap     string // name of its device; empty without network
	paged   *paged // serves its memory; nil: all of it is there
	from    string // directory of the snapshot, when paged is not nil and not adopted

	// bare says that it has no agent; link is then its network, nil for none.
	bare bool
	link *sandbox.Link

	console sync.Mutex // held while the file with what its console said is used

	released sync.Once // paged was

	mu      sync.Mutex
	session *serial.Session // nil until the guest was reached
}

// origin is what a machine starts from. Names are of files in the machine's
// own directory.
type origin struct {
	Shape  shape      `json:"shape"`
	Base   []pageFile `json:"base"`            // make the memory that it maps; none: all zeros
	Delta  *pageFile  `json:"delta,omitempty"` // written into its own memory; nil: nothing
	Layers []string   `json:"layers"`          // of its disk, upon the empty file system or the image
}

// start is how a machine starts.
type start int

const (
	waiting    start = iota // for its state
	booting                 // its kernel, in memory of its own
	asTemplate              // booting, in the memory that its clones will map
)

// devicesName is the file with the state of devices.
const devicesName = "devices"

// layerName is the file of a layer of the disk.
func layerName(i int) string { return fmt.Sprintf("disk%d.qcow2", i) }

// spawn starts a machine in dir: one that waits for its state, or one that boots.
// All that the origin names is in dir, and memory is what it describes. A failed
// spawn leaves no process and no group.
func (r *Runtime) spawn(ctx context.Context, dir, groupName, root string, o origin, memory *os.File, how start) (v *vm, err error) {
	s := o.Shape
	v = &vm{dir: dir, group: r.boxes.Groups.Group(groupName), bare: s.Bare}
	c := vmm.Config{
		Dir: dir, Port: wire.MachineSerial, Group: v.group, Memory: memory, Size: s.Memory, CPUs: s.CPUs, MAC: guestMAC,
		PC: s.PC, Boot: s.PC && how != waiting,
	}
	// What a machine writes to memory of its own that it maps privately is there
	// twice: the file's page is made too.
	c.Shared = how == asTemplate || c.Boot
	if c.Disks, err = r.disks(ctx, dir, root, o); err != nil {
		return nil, err
	}
	if how != waiting && !s.PC {
		k, err := r.prepare(ctx)
		if err != nil {
			return nil, err
		}
		c.Kernel = &vmm.Kernel{Image: k.Vmlinux, Initrd: k.Initramfs, Args: kernel.Args}
	}
	if s.Network {
		t, err := r.taps.make()
		if err != nil {
			return nil, err
		}
		defer t.file.Close()
		v.tap, c.Tap = t.name, t.file
	}
	if err := v.group.Create(); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	if err := v.group.Limit(limits(sandbox.Resources{Memory: s.Memory})); err != nil {
		return nil, errors.Join(fmt.Errorf("limit control group: %w", err), v.group.Remove())
	}
	if v.machine, err = r.driver.Start(ctx, c); err != nil {
		return nil, errors.Join(err, v.group.Remove())
	}
	return v, nil
}

// disks are those of a machine, in the order in which it has them.
func (r *Runtime) disks(ctx context.Context, dir, root string, o origin) ([]vmm.Disk, error) {
	var layers []string
	for _, name := range o.Layers {
		layers = append(layers, filepath.Join(dir, name))
	}
	if o.Shape.PC {
		return r.fullDisks(dir, root, layers, o.Shape)
	}
	empty, err := disk.Empty(ctx, filepath.Join(r.cfg.Cache, "disk"), o.Shape.Disk)
	return []vmm.Disk{
		{Serial: wire.DiskRoot, Layers: []string{root}},
		{Serial: wire.DiskOverlay, Layers: append([]string{empty}, layers...), Writable: true},
	}, err
}

// clone starts a machine from what its origin, in dir, describes, but does not
// give it its state yet.
func (r *Runtime) clone(ctx context.Context, dir, groupName, root string, o origin) (*vm, error) {
	memory, err := r.memories.get(dir, o.Base, o.Shape.Memory)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	return r.spawn(ctx, dir, groupName, root, o, memory, waiting)
}

// cold boots a machine in dir and returns when its agent answers.
func (r *Runtime) cold(ctx context.Context, dir, groupName, root string, o origin) (*vm, error) {
	memory, err := vmm.NewMemory(o.Shape.Memory)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	v, err := r.spawn(ctx, dir, groupName, root, o, memory, booting)
	if err != nil {
		return nil, err
	}
	if _, err := v.reach(ctx); err != nil {
		return nil, errors.Join(err, v.End())
	}
	return v, nil
}

// monitorMemory is what a machine's monitor may use beyond the guest's memory, in
// bytes: its own heap, translated code, and pages of the disk's file.
const monitorMemory = 128 << 20

// limits bounds the group of a machine. The guest's memory counts twice: where the
// template's is a hole, the host's kernel fills that in with zeros before it copies
// it for whoever writes there first, and that one's group is charged with both.
func limits(res sandbox.Resources) cgroup.Limits {
	const tasks = 64 // threads of the monitor
	return cgroup.Limits{CPUs: res.CPUs, Memory: 2*res.Memory + monitorMemory, Tasks: tasks}
}

// load gives a machine that waits its state, with which it runs.
func (v *vm) load(ctx context.Context, o origin) error {
	if o.Delta != nil {
		if err := o.Delta.readPages(v.dir, o.Shape.Memory, v.machine.WritePages); err != nil {
			return err
		}
	}
	f, err := os.Open(filepath.Join(v.dir, devicesName))
	if err != nil {
		return err
	}
	defer f.Close()
	return v.machine.Load(ctx, f)
}

// reachTimeout bounds how long a guest may take to answer on its port, also while
// its kernel boots.
const reachTimeout = 60 * time.Second

// reach returns the session with the guest, which is made when there is none or
// when it has ended.
func (v *vm) reach(ctx context.Context) (*serial.Session, error) {
	return v.reachWithin(ctx, reachTimeout)
}

func (v *vm) reachWithin(ctx context.Context, timeout time.Duration) (*serial.Session, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := v.living(); s != nil {
		return s, nil
	}
	err := v.open(ctx, timeout, func(ctx context.Context, conn net.Conn) (s *serial.Session, err error) { return serial.Open(ctx, conn) })
	return v.session, err
}

// ask puts a question to the guest, as the first that it hears of us if we have no
// session yet: a clone is reached and told who it is by one message.
func (v *vm) ask(ctx context.Context, question []byte) (answer []byte, err error) {
	v.mu.Lock()
	s := v.living()
	if s == nil {
		defer v.mu.Unlock()
		err := v.open(ctx, reachTimeout, func(ctx context.Context, conn net.Conn) (s *serial.Session, err error) {
			s, answer, err = serial.OpenAsking(ctx, conn, question)
			return s, err
		})
		return answer, err
	}
	v.mu.Unlock()
	if answer, err = s.Ask(ctx, question); err != nil {
		return nil, v.explain(err)
	}
	return answer, nil
}

// living returns the session, nil when there is none or it has ended; v.mu is held.
func (v *vm) living() *serial.Session {
	if v.session == nil {
		return nil
	}
	select {
	case <-v.session.Done():
		v.session.Close()
		v.session = nil
	default:
	}
	return v.session
}

// open makes the session by what begin does on the guest's port; v.mu is held.
func (v *vm) open(ctx context.Context, timeout time.Duration, begin func(context.Context, net.Conn) (*serial.Session, error)) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ctx, stop := v.whileAlive(ctx)
	defer stop()
	conn, err := v.machine.Serial()
	if err != nil {
		return v.explain(err)
	}
	s, err := begin(ctx, conn)
	if err != nil {
		return v.explain(err)
	}
	v.session = s
	return nil
}

// whileAlive ends the context when the machine ends.
func (v *vm) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-v.machine.Ended():
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// dialTimeout bounds one dial, also when the guest does not answer at all.
const dialTimeout = 10 * time.Second

// Dial opens a connection to a port of the guest.
func (v *vm) Dial(ctx context.Context, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if v.bare {
		return v.dialLink(ctx, port)
	}
	return v.dial(ctx, port)
}

func (v *vm) dial(ctx context.Context, port int) (net.Conn, error) {
	s, err := v.reach(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := s.Dial(ctx, port)
	if err != nil {
		return nil, v.explain(err)
	}
	return conn, nil
}

// maker is a client for the calls that only a machine's maker can make.
func (v *vm) maker() *guest.Client {
	return guest.New(func(ctx context.Context) (net.Conn, error) { return v.dial(ctx, serial.MachinePort) }, guest.Options{})
}

// identify tells the guest who it is: what it was copied from has the same random
// numbers, an old clock, and another's name and address; and how many processes
// there may be, which only its own kernel can count.
func (v *vm) identify(ctx context.Context, spec sandbox.Spec, pids, mtu int) error {
	in := wire.Machine{Time: time.Now(), Entropy: make([]byte, 64), Hostname: spec.Hostname, Pids: pids}
	_, _ = rand.Read(in.Entropy) // never fails since Go 1.24
	if in.Hostname == "" {
		in.Hostname = spec.ID
	}
	if l := spec.Link; l != nil {
		in.Network = &wire.MachineNetwork{MTU: mtu, Address: l.Address, Gateway: l.Gateway, Resolver: l.Gateway}
	}
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	return v.tell(ctx, in)
}

// tell has the guest become what in says.
func (v *vm) tell(ctx context.Context, in wire.Machine) error {
	question, err := in.AppendBinary(nil)
	if err != nil {
		return err
	}
	answer, err := v.ask(ctx, question)
	if err == nil && len(answer) > 0 {
		err = fmt.Errorf("the guest says: %.500q", answer)
	}
	return err
}

// join gives the machine the sandbox's network and limits.
func (r *Runtime) join(v *vm, spec sandbox.Spec, res sandbox.Resources) (mtu int, err error) {
	if err := v.group.Limit(limits(res)); err != nil {
		return 0, fmt.Errorf("limit control group: %w", err)
	}
	if spec.Link == nil {
		return 0, nil
	}
	return r.taps.join(v.tap, spec.Link)
}

// End kills the machine and removes its control group.
func (v *vm) End() error {
	if v.paged != nil {
		v.paged.of.r.learn(v)
	}
	err := v.machine.Kill() // first: it ends whoever waits for the guest
	v.hangUp()
	if v.paged != nil {
		v.released.Do(func() { err = errors.Join(err, v.paged.release()) })
	}
	return errors.Join(err, v.group.Remove())
}

// hangUp ends the session with the guest.
func (v *vm) hangUp() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.session != nil {
		v.session.Close()
		v.session = nil
	}
}

// setClock tells a guest that stood still what time it is.
func (v *vm) setClock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return v.tell(ctx, wire.Machine{Time: time.Now()})
}

// move says that the machine's directory has another name now.
func (v *vm) move(dir string) {
	v.dir = dir
	v.machine.Move(dir)
}

// processes counts the guest's processes.
func (v *vm) processes(ctx context.Context) (int, error) {
	g := v.maker()
	defer g.CloseIdle()
	return g.Processes(ctx)
}
