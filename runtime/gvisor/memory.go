package gvisor

import (
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// memoryInterval is how often the sandboxes' control groups are asked whether the
// kernel killed something in them. One question takes about 20 µs.
const memoryInterval = time.Second

// watchMemory reports until stop is closed when processes of sandboxes were
// killed for want of memory though their sandbox lives on.
func (r *Runtime) watchMemory(stop <-chan struct{}) {
	tick := time.NewTicker(memoryInterval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		r.mu.Lock()
		boxes := make([]*box, 0, len(r.boxes))
		for _, b := range r.boxes {
			boxes = append(boxes, b)
		}
		r.mu.Unlock()
		for _, b := range boxes {
			if b.starved() {
				st := b.status()
				r.events.Send(sandbox.Event{
					Sandbox: st.ID, Kind: sandbox.EventResource, State: st.State,
					Reason: "out of memory: the kernel killed a process of the sandbox",
				})
			}
		}
	}
}

// starved reports whether the kernel killed a process of the living sandbox
// since it was asked last.
func (b *box) starved() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sentry == nil || b.sentry.proc.Ending() {
		return false // watch reports the end of a sandbox
	}
	before := b.ooms
	b.ooms = b.sentry.group.OutOfMemory()
	return b.ooms > before
}
