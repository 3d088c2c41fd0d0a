package microvm

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// shape is what machines must share to be clones of one template.
type shape struct {
	Kernel  string `json:"kernel"` // digest
	Root    string `json:"root"`   // digest
	Monitor string `json:"monitor"`
	Memory  int64  `json:"memory"` // bytes
	Disk    int64  `json:"disk"`   // bytes
	CPUs    int    `json:"cpus"`
	Network bool   `json:"network"`
	PC      bool   `json:"pc,omitempty"`   // boots a full disk image, which Root is then
	Bare    bool   `json:"bare,omitempty"` // has no agent
}

// key names the template of a shape.
func (s shape) key() string {
	data, _ := json.Marshal(s) // numbers and strings only: it cannot fail
	sum := blake3.Sum256(data)
	return hex.EncodeToString(sum[:12])
}

// shapeOf is the shape of the machine that a spec asks for, with a kernel.
func (r *Runtime) shapeOf(spec sandbox.Spec, res sandbox.Resources, kernel string) shape {
	pc := spec.Root.Kind == sandbox.RootDisk
	if pc {
		kernel = "" // it has its own
	}
	return shape{
		PC: pc, Bare: !spec.HasAgent(), Kernel: kernel, Root: cmp.Or(spec.Root.Digest, spec.Root.Path), Monitor: r.driver.Version(),
		Memory: r.driver.Memory(res.Memory), Disk: disk.Round(res.Disk),
		CPUs: r.driver.CPUs(int(math.Ceil(res.CPUs))), Network: spec.Network == sandbox.NetworkSandbox,
	}
}

const (
	templateName    = "template.json"
	memoryName      = "memory" // page file of a template
	newPrefix       = ".new-"
	templateTimeout = 2 * time.Minute // to boot one, on a very busy host
)

// templates makes templates, each once, and finds them again.
type templates struct {
	r    *Runtime
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	making map[string]*making
}

// making is a template that is being made or looked for.
type making struct {
	done chan struct{}
	err  error
}

func newTemplates(r *Runtime) *templates {
	t := &templates{r: r, making: make(map[string]*making)}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t
}

// close ends what is being made.
func (t *templates) close() {
	t.stop()
	t.wg.Wait()
}

func (t *templates) dir(s shape) string { return filepath.Join(t.r.cfg.Cache, "templates", s.key()) }

// place puts what a clone starts from into the directory of a machine. The
// template is made if there is none, from the root file; that goes on when ctx
// ends, for the next to ask. A damaged one is made anew.
func (t *templates) place(ctx context.Context, dir string, s shape, root string) (origin, error) {
	for again := true; ; again = false {
		if err := t.ensure(ctx, s, root); err != nil {
			return origin{}, err
		}
		o, err := t.link(dir, s)
		if err == nil {
			return o, nil
		}
		t.r.log.Error("a template cannot be used and is made anew", "template", s.key(), "err", err)
		if err := os.RemoveAll(t.dir(s)); err != nil || !again {
			return origin{}, sandbox.E("use template", sandbox.Internal, s.key(), errors.Join(errDamaged, err))
		}
	}
}

// link links a template's files into dir, and checks them.
func (t *templates) link(dir string, s shape) (origin, error) {
	from := t.dir(s)
	data, err := os.ReadFile(filepath.Join(from, templateName))
	if err != nil {
		return origin{}, err
	}
	var m template
	if err := json.Unmarshal(data, &m); err != nil {
		return origin{}, err
	}
	if m.Shape != s || len(m.Base) != 1 || len(m.Layers) != 1 {
		return origin{}, errors.New("it is another template")
	}
	memory, err := t.r.memories.get(from, m.Base, s.Memory) // which checks it, unless it has it
	if err != nil {
		return origin{}, err
	}
	memory.Close()
	_ = os.Chtimes(filepath.Join(from, templateName), time.Time{}, time.Now()) // its last use, see sweep
	for name, want := range m.Digests {
		if err := t.r.checked(filepath.Join(from, name), want); err != nil {
			return origin{}, err
		}
	}
	for _, name := range []string{m.Base[0].Name, m.Layers[0], devicesName} {
		_ = os.Remove(filepath.Join(dir, name)) // of an attempt before
		if err := supervisor.LinkFile(filepath.Join(dir, name), filepath.Join(from, name)); err != nil {
			return origin{}, err
		}
	}
	return m.origin, nil
}

// template is what template.json holds.
type template struct {
	origin
	Digests map[string]string `json:"digests"` // of the files besides memory, by name
}

// checked compares a small file with its digest.
func (r *Runtime) checked(path, want string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if got := digestOfBytes(data); got != want {
		return fmt.Errorf("%s: %w", path, errDamaged)
	}
	return nil
}

func digestOfBytes(data []byte) string {
	hash := blake3.New()
	_, _ = hash.Write(data) // never fails
	return digestOf(hash)
}

// ensure returns when there is a template of the shape.
func (t *templates) ensure(ctx context.Context, s shape, root string) error {
	key := s.key()
	t.mu.Lock()
	m := t.making[key]
	if m == nil {
		if _, err := os.Stat(filepath.Join(t.dir(s), templateName)); err == nil {
			t.mu.Unlock()
			return nil
		}
		m = &making{done: make(chan struct{})}
		t.making[key] = m
		t.wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.ctx, templateTimeout)
			defer cancel()
			m.err = t.make(ctx, s, root)
			t.mu.Lock()
			delete(t.making, key)
			t.mu.Unlock()
			close(m.done)
		})
	}
	t.mu.Unlock()
	select {
	case <-m.done:
		return m.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// make boots a machine of the shape, freezes it once its agent answers, and keeps
// its state.
func (t *templates) make(ctx context.Context, s shape, root string) (err error) {
	dir, err := os.MkdirTemp(filepath.Join(t.r.cfg.Cache, "templates"), newPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	begin := time.Now()
	m := template{origin: origin{Shape: s, Layers: []string{layerName(0)}}, Digests: make(map[string]string)}
	if err := disk.MakeLayer(filepath.Join(dir, layerName(0)), s.Disk); err != nil {
		return err
	}
	if m.Base, err = t.freeze(ctx, dir, root, m.origin); err != nil {
		return fmt.Errorf("boot a template: %w", err)
	}
	for _, name := range []string{layerName(0), devicesName} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		m.Digests[name] = digestOfBytes(data)
		if err := supervisor.Sync(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := supervisor.WriteSynced(filepath.Join(dir, templateName), data); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, "qmp.sock")), os.RemoveAll(filepath.Join(dir, "serial.sock"))); err != nil {
		return err
	}
	if err := os.Rename(dir, t.dir(s)); err != nil && !errors.Is(err, os.ErrExist) {
		return err // that one exists: another process was faster
	}
	t.r.log.Info("made a template", "template", s.key(), "took", time.Since(begin).Round(time.Millisecond))
	return errors.Join(supervisor.Sync(filepath.Dir(t.dir(s))), t.sweep())
}

// freeze boots the machine and writes its memory and devices into dir.
func (t *templates) freeze(ctx context.Context, dir, root string, o origin) (base []pageFile, err error) {
	memory, err := vmm.NewMemory(o.Shape.Memory)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			memory.Close()
		}
	}()
	v, err := t.r.spawn(ctx, dir, filepath.Base(dir), root, o, memory, asTemplate)
	if err != nil {
		return nil, err
	}
	err = v.warmUp(ctx)
	if err == nil {
		// What the kernel still has to do for what has ended, every clone would do.
		err = sleep(ctx, settleTime)
	}
	if err == nil {
		err = v.tell(ctx, wire.Machine{Rest: true})
	}
	if err == nil {
		err = sleep(ctx, restTime)
	}
	if err == nil {
		err = v.machine.Pause(ctx)
	}
	if err == nil {
		err = saveDevices(ctx, v, dir)
	}
	if err = errors.Join(err, v.End()); err != nil {
		return nil, err
	}
	if err := vmm.Seal(memory); err != nil {
		return nil, err
	}
	p, err := dumpMemory(memory, o.Shape.Memory, dir, memoryName)
	if err != nil {
		return nil, err
	}
	t.r.memories.add([]pageFile{p}, memory)
	return []pageFile{p}, nil
}

const (
	// settleTime is how long a machine is left alone before it becomes a template.
	settleTime = time.Second
	// restTime is how long its agent rests then. At first the thread of Go that
	// watches over the others looks after them every 20 µs.
	restTime = 50 * time.Millisecond
)

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// nobodys is the spec of a machine that belongs to nobody yet.
var nobodys = sandbox.Spec{Link: &sandbox.Link{
	Address: netip.MustParsePrefix("192.0.2.2/30"), Gateway: netip.MustParseAddr("192.0.2.1"), // for documentation only
}}

// nobodysMTU is the size of its packets, bytes: small, so that its network gets another.
const nobodysMTU = 1280

// nobodysNames are what it is called, one after the other, which is how often it is
// asked what it will be asked later. The last is as short as can be, so that no file
// that holds it is to be cut when a sandbox gets its own.
var nobodysNames = []string{"nobodys-sandbox", "n"}

// warmUp asks the guest for what it will be asked later. The first time costs
// several times what later ones do: memory is touched, which clones then share,
// and where machines are emulated code is translated, which a machine of the
// pool then has.
func (v *vm) warmUp(ctx context.Context) error {
	g := guest.New(func(ctx context.Context) (net.Conn, error) { return v.dial(ctx, sandbox.GuestPort) }, guest.Options{})
	defer g.CloseIdle()
	if err := g.WaitHealthy(ctx); err != nil {
		return err
	}
	spec := nobodys
	if v.tap == "" {
		spec.Link = nil
	}
	for _, spec.ID = range nobodysNames {
		if err := v.identify(ctx, spec, math.MaxInt32, nobodysMTU); err != nil { // as many processes as its kernel can have
			return err
		}
		// Without a token or an environment, which whoever makes a sandbox of it sets.
		now := time.Now()
		if err := g.Init(ctx, wire.Init{Hostname: spec.ID, Timestamp: &now}); err != nil {
			return err
		}
		g.WarmUp(ctx)
	}
	return nil
}

// saveDevices writes the devices' state of a paused machine.
func saveDevices(ctx context.Context, v *vm, dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, devicesName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(v.machine.SaveDevices(ctx, f), f.Close())
}
