package microvm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/sandbox"
)

// LabelMemory is the label of a spec that says how the memory of a restored
// machine is read, for measuring each way apart. Without it the machine runs before
// its memory was read, and what restores before it needed is fetched ahead of need.
const LabelMemory = "microvm.memory"

// The values of LabelMemory.
const (
	MemoryWhole = "whole" // all of it before the machine runs
	MemoryLazy  = "lazy"  // each page when it is touched, and none ahead of need
)

// lazyFrom is the size in bytes of a memory's pages from which on they are read
// when they are touched: fewer are read sooner than a pager starts.
const lazyFrom = 16 << 20

// pagers are the pagers of this runtime's machines.
type pagers struct {
	r       *Runtime
	groups  *cgroup.Parent
	ctx     context.Context // ends with stopLearning
	stop    context.CancelFunc
	lessons sync.WaitGroup // goroutines that will learn from a restore

	mu      sync.Mutex
	serial  int // of the last pager's group
	byKey   map[string]*paged
	adopted []*paged
}

// paged is a memory that a pager serves to one or more machines.
type paged struct {
	*pager.Pager
	of   *pagers
	key  string   // of its page files; empty: it was adopted
	plan []uint32 // what it fetches ahead
	uses int      // machines; guarded by of.mu
	once sync.Once
}

// openPagers makes pagers possible. Their control groups lie apart from those of
// the sandboxes.
func openPagers(r *Runtime) (*pagers, error) {
	groups, err := cgroup.Open(r.cfg.Prefix + pagersSuffix)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	return &pagers{r: r, groups: groups, ctx: ctx, stop: stop, byKey: make(map[string]*paged)}, nil
}

// pagersSuffix ends the name of the control group under which those of pagers lie.
const pagersSuffix = "-memory"

// sweep ends pagers that serve no machine any more that is on record.
func (g *pagers) sweep() error {
	known := make(map[string]bool)
	for _, b := range g.r.boxes.All() {
		known[b.Record().PagerGroup] = true
	}
	var errs []error
	for _, name := range g.groups.List() {
		if !known[name] {
			errs = append(errs, g.groups.Group(name).Remove())
		}
	}
	return errors.Join(errs...)
}

// get returns a pager of the memory of page files in dir, for one machine, which
// must release it. plan is what it fetches ahead if it is a new one; wants is where
// it asks for files that are still on their way, nil when all of them are there.
func (g *pagers) get(dir string, files []pageFile, size int64, plan []uint32, wants *os.File) (*paged, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := memoryKey(files)
	if p := g.byKey[key]; p != nil && !p.Process.Ending() {
		p.uses++
		return p, nil
	}
	var layers []pager.Layer
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	for _, file := range files {
		f, err := os.Open(filepath.Join(dir, file.Name))
		if err != nil {
			return nil, err
		}
		open = append(open, f)
		l, err := file.layer(f, size)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file.Name, err)
		}
		if wants != nil {
			l.Late = file.Name
		}
		layers = append(layers, l)
	}
	g.serial++
	group := g.groups.Group(fmt.Sprintf("%d-%d", os.Getpid(), g.serial))
	started, err := pager.Start(group, size, layers, open, plan, wants)
	if err != nil {
		return nil, err
	}
	p := &paged{Pager: started, of: g, key: key, plan: plan, uses: 1}
	g.byKey[key] = p
	return p, nil
}

// adopt takes over the pager of a machine that was adopted.
func (g *pagers) adopt(group string, proc *process.Process) (*paged, error) {
	a, err := pager.Adopt(g.groups.Group(group), proc)
	if err != nil {
		return nil, err
	}
	p := &paged{Pager: a, of: g, uses: 1}
	p.once.Do(func() {}) // it tells no trace any more
	g.mu.Lock()
	defer g.mu.Unlock()
	g.adopted = append(g.adopted, p)
	return p, nil
}

// endTimeout bounds how long a pager may take to notice that nobody needs it.
const endTimeout = 10 * time.Second

// release ends the pager when it was its last machine's, which has ended.
func (p *paged) release() error {
	p.of.mu.Lock()
	defer p.of.mu.Unlock()
	if p.uses--; p.uses > 0 {
		return nil
	}
	if p.key == "" {
		return nil // another machine may use it that was adopted with a hold of its own
	}
	if p.of.byKey[p.key] == p {
		delete(p.of.byKey, p.key)
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	return p.End(ctx)
}

// stopLearning returns when nothing is learned any more.
func (g *pagers) stopLearning() {
	g.stop()
	g.lessons.Wait()
}

// close lets all pagers go.
func (g *pagers) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.byKey {
		_ = p.Close()
	}
	for _, p := range g.adopted {
		_ = p.Close()
	}
	g.byKey, g.adopted = nil, nil
	g.groups.Close()
}

// layer describes an open page file to a pager. size is of the memory.
func (p pageFile) layer(f *os.File, size int64) (pager.Layer, error) {
	_, runs, first, err := parsePagesHeader(bufio.NewReader(f))
	if err != nil {
		return pager.Layer{}, err
	}
	l := pager.Layer{Length: first + pagesBytes(runs), First: first}
	l.Sums = make([]byte, pager.SumCount(l.Length)*pager.SumSize)
	if _, err := f.ReadAt(l.Sums, l.Length); err != nil && !errors.Is(err, io.EOF) {
		return l, err
	}
	if digestOfBytes(l.Sums) != p.Sums {
		return l, errDamaged
	}
	// What was read without a check above says only where the sums are.
	checked, err := pager.NewChecked(f, l.Length, l.Sums)
	if err != nil {
		return l, err
	}
	have, runs, _, err := parsePagesHeader(bufio.NewReader(io.NewSectionReader(checked, 0, l.Length)))
	if err != nil {
		return l, err
	}
	if have != size {
		return l, fmt.Errorf("it is of a memory of %d bytes, not %d", have, size)
	}
	l.Runs = runs
	return l, nil
}

// lazily reports whether a machine's memory is to be read page by page.
func (r *Runtime) lazily(label string, files []pageFile) bool {
	var bytes int64
	for _, f := range files {
		if f.Sums == "" {
			return false
		}
		bytes += f.Bytes
	}
	return label != MemoryWhole && bytes >= lazyFrom && (label == MemoryLazy || !r.memories.has(files))
}

// awaken starts the machine of a snapshot in dir from, waiting for the state of its
// devices. Its memory is read meanwhile and later, if that can be.
func (r *Runtime) awaken(ctx context.Context, b *box, from string) (*vm, error) {
	spec, o := b.Record().Spec, b.Record().Origin
	label := spec.Labels[LabelMemory]
	wants, err := arrive.Open(from)
	if err != nil {
		return nil, err
	}
	if wants != nil {
		defer wants.Close()
		err = r.awaitHeads(ctx, b.Dir, o, wants)
	}
	switch lazily := r.lazily(label, o.Base); {
	case err != nil:
		return nil, err
	case !lazily && wants != nil && !r.memories.has(o.Base):
		return nil, sandbox.Errorf("read snapshot", sandbox.Unavailable, "", "it is still on its way from another node, and its memory cannot be read page by page").
			WithHint("restore it when it is here")
	case !lazily:
		return r.clone(ctx, b.Dir, spec.ID, spec.Root.Path, o)
	}
	var plan []uint32
	model := r.readModel(from)
	if label != MemoryLazy {
		plan = model.Plan()
	}
	p, err := r.pagers.get(b.Dir, o.Base, o.Shape.Memory, plan, wants)
	if errors.Is(err, errDamaged) || err != nil && wants != nil {
		return nil, err
	}
	if err != nil {
		r.log.Warn("a machine waits until all of its memory was read", "sandbox", spec.ID, "err", err)
		return r.clone(ctx, b.Dir, spec.ID, spec.Root.Path, o)
	}
	if err := writeModel(filepath.Join(b.Dir, modelName), model); err != nil {
		return nil, errors.Join(err, p.release())
	}
	v, err := r.spawn(ctx, b.Dir, spec.ID, spec.Root.Path, o, p.Memory, waiting)
	if err != nil {
		return nil, errors.Join(err, p.Cause(), p.release())
	}
	v.paged, v.from = p, from
	r.pagers.lessons.Go(func() {
		select {
		case <-time.After(early):
			r.learn(v)
		case <-v.machine.Ended():
		case <-r.pagers.ctx.Done():
		}
	})
	return v, nil
}

// pagerEnded is closed when the machine's memory is no longer served; nil when all
// of it is there.
func (v *vm) pagerEnded() <-chan struct{} {
	if v.paged == nil {
		return nil
	}
	return v.paged.Ended()
}

// lostMemory says why the machine's memory is gone; empty: it is not.
func (v *vm) lostMemory() string {
	if v.paged == nil || !v.paged.Process.Ending() {
		return ""
	}
	<-v.paged.Ended() // it is about to be
	if err := v.paged.Cause(); err != nil {
		return fmt.Sprintf("the machine's memory cannot be read: %v", err)
	}
	return "the process that held the machine's memory ended or was killed"
}

// openLeaf opens a file for reading whose last name may be no link: whoever can
// write to a snapshot's directory must not choose what is read.
func openLeaf(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
}
