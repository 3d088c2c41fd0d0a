package microvm

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

// A guest that is let alone keeps what it read of its files. When the host has
// little memory left, idle guests give that back: a device in them, the balloon,
// takes memory from the guest and hands it to the host. A guest that works again, or
// has little left, gets its memory back whole; until that is noticed, its kernel takes
// from the balloon what it lacks.

const (
	// balloonEvery is how often that is looked after.
	balloonEvery = 10 * time.Second
	// Below a share of pressure of the host's memory available, idle guests give
	// until there is relief; above that, all get back what they gave.
	pressure, relief = 0.15, 0.25
	// balloonsAtOnce bounds how many guests give in one round, which costs each of
	// them some processor time.
	balloonsAtOnce = 8
	// idleShare is the share of a processor below which a machine is idle.
	idleShare = 0.05
	// balloonLeast is the least that is worth a guest's work, in bytes.
	balloonLeast = 8 << 20
)

// guestMemory is what decides how much memory a guest may use.
type guestMemory struct {
	size      int64 // of its memory, bytes
	given     int64 // what it may use of it now
	available int64 // what it says that it could do without; negative: unknown
	held      int64 // what the host holds of it for this guest alone
	idle      bool
}

// reserve is how much a guest keeps of what it could do without, in bytes.
func (g guestMemory) reserve() int64 { return max(32<<20, g.size/8) }

// spare is how much the host would get from a guest.
func (g guestMemory) spare() int64 {
	if !g.idle || g.available < 0 {
		return 0
	}
	// Of what a guest does not use the host may hold little: it was never touched,
	// or given back.
	return min(g.available-g.reserve(), g.held-(g.given-g.available))
}

// shareMemory says how much memory each guest may use from now on.
func shareMemory(host memoryInfo, guests []guestMemory) []int64 {
	to := make([]int64, len(guests))
	var order []int
	for i, g := range guests {
		to[i] = g.given
		// What it could do without now counts what its balloon could still take.
		pressed := g.available >= 0 && g.available < g.reserve()/2
		if g.given < g.size && (!g.idle || pressed || float64(host.available) > relief*float64(host.total)) {
			to[i] = g.size
		} else if g.spare() >= balloonLeast {
			order = append(order, i)
		}
	}
	if float64(host.available) >= pressure*float64(host.total) {
		return to
	}
	slices.SortStableFunc(order, func(a, b int) int { return int(guests[b].spare()>>20 - guests[a].spare()>>20) })
	lack := int64(relief*float64(host.total)) - host.available
	for _, i := range order[:min(len(order), balloonsAtOnce)] {
		if lack <= 0 {
			break
		}
		// The guest's kernel takes for the balloon what is free first, and only then
		// from what it holds of files: so it must be asked for both.
		to[i] = guests[i].given - (guests[i].available - guests[i].reserve())
		lack -= guests[i].spare()
	}
	return to
}

// balloons looks after the memory of guests until it is closed.
type balloons struct {
	r    *Runtime
	stop context.CancelFunc
	done chan struct{}
	mu   sync.Mutex // one round at a time
	seen map[*vm]glance
}

// glance is what was seen of a machine in one round.
type glance struct {
	at      time.Time
	cpu     time.Duration // used so far
	given   int64
	told    int64 // how much it was asked to use; 0: nothing yet
	filling bool  // its balloon, which is work that we gave it
}

// next is what is seen of a machine after was, and whether it did nothing of its own
// in between.
func (was glance) next(at time.Time, cpu time.Duration, given int64) (now glance, idle bool) {
	now = glance{at: at, cpu: cpu, given: given, told: was.told}
	now.filling = given != was.given || was.told != 0 && was.told < was.given
	return now, now.filling || was.filling || float64(cpu-was.cpu) < idleShare*float64(at.Sub(was.at))
}

func newBalloons(r *Runtime) *balloons {
	ctx, stop := context.WithCancel(context.Background())
	b := &balloons{r: r, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(b.done)
		tick := time.NewTicker(balloonEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if host, err := hostMemory(); err == nil {
				b.round(ctx, host)
			}
		}
	}()
	return b
}

func (b *balloons) close() {
	b.stop()
	<-b.done
}

// round looks at all guests once and has them give or take. While the host has
// enough no guest is disturbed: its monitor alone is asked.
func (b *balloons) round(ctx context.Context, host memoryInfo) {
	b.mu.Lock()
	defer b.mu.Unlock()
	tight := float64(host.available) < pressure*float64(host.total)
	seen := make(map[*vm]glance)
	var vms []*vm
	var guests []guestMemory
	for _, box := range b.r.boxes.All() {
		v, err := box.Live("share memory", sandbox.Running)
		if err != nil {
			continue // it stands still, and could not give anything
		}
		var size int64
		box.View(func(r *record) { size = r.Origin.Shape.Memory })
		g := guestMemory{size: size, available: -1}
		if g.given, err = v.machine.Given(ctx); err != nil {
			continue
		}
		now := glance{at: time.Now(), cpu: v.group.CPU(), given: g.given}
		if was, ok := b.seen[v]; ok {
			now, g.idle = was.next(now.at, now.cpu, now.given)
		}
		seen[v] = now
		vms, guests = append(vms, v), append(guests, g)
	}
	b.seen = seen
	if tight {
		askAvailable(ctx, vms, guests)
	}
	for i, size := range shareMemory(host, guests) {
		if size == guests[i].given {
			continue
		}
		was := seen[vms[i]]
		was.told = size
		seen[vms[i]] = was
		if err := vms[i].machine.Give(ctx, size); err != nil {
			b.r.log.Warn("asking a guest to use another part of its memory", "dir", vms[i].dir, "from", guests[i].given, "to", size, "err", err)
		}
	}
}

// askAvailable asks the idle guests how much they could do without, some at a time,
// and looks what the host holds for them.
func askAvailable(ctx context.Context, vms []*vm, guests []guestMemory) {
	places := make(chan bool, balloonsAtOnce)
	var all sync.WaitGroup
	for i := range guests {
		if !guests[i].idle {
			continue
		}
		all.Go(func() {
			places <- true
			defer func() { <-places }()
			n, err := vms[i].machine.Available(ctx)
			if err != nil {
				return // it need not answer
			}
			changed, err := vms[i].machine.Changed()
			if err != nil {
				return // it has ended
			}
			guests[i].available, guests[i].held = min(n, guests[i].given), vmm.PageSize*countPages(changed)
		})
	}
	all.Wait()
}

func countPages(runs []vmm.Run) (n int64) {
	for _, run := range runs {
		n += int64(run.Count)
	}
	return n
}
