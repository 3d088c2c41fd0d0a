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
	seen := make(map[*sentry]int64) // processes that were killed, as far as reported
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		killed := make(map[*sentry]int64)
		for _, b := range r.boxes.All() {
			s, err := b.Live("", sandbox.Running, sandbox.Paused)
			if err != nil || s.Ending() {
				continue // its end is reported anyway
			}
			killed[s] = s.group.OutOfMemory()
			if st := b.Status(); killed[s] > seen[s] {
				r.boxes.Events.Send(sandbox.Event{
					Sandbox: st.ID, Kind: sandbox.EventResource, State: st.State,
					Reason: "out of memory: the kernel killed a process of the sandbox",
				})
			}
		}
		seen = killed
	}
}
