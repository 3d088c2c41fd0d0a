package gvisor

import (
	"context"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/sandbox"
	"golang.org/x/sys/unix"
)

// statsTimeout bounds the question to the sentry for its processes.
const statsTimeout = 2 * time.Second

// Stats reads what the sandbox uses now.
func (r *Runtime) Stats(ctx context.Context, id string) (sandbox.Stats, error) {
	const op = "gvisor.Stats"
	b, err := r.boxes.Find(op, id)
	if err != nil {
		return sandbox.Stats{}, err
	}
	s, err := b.Live(op, sandbox.Running, sandbox.Paused)
	if err != nil {
		return sandbox.Stats{}, err
	}
	var res sandbox.Resources
	var link *sandbox.Link
	b.View(func(rec *record) { res, link = rec.Resources, rec.Spec.Link })
	st := sandbox.Stats{
		Time:        time.Now(),
		CPU:         s.group.CPU(),
		Memory:      s.group.Memory(),
		MemoryLimit: res.Memory,
		Disk:        s.overlaySize(),
		DiskLimit:   res.Disk,
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	cid := orders.ContainerID
	var procs []orders.Process
	if err := call(ctx, s.dir, orders.CallProcesses, &cid, &procs); err != nil {
		return sandbox.Stats{}, sandbox.E(op, "", id, err)
	}
	for _, p := range procs {
		st.Pids += max(1, len(p.Threads))
	}
	if link != nil {
		if st.RxBytes, st.TxBytes, err = linkBytes(link); err != nil {
			return sandbox.Stats{}, sandbox.E(op, "", id, err)
		}
	}
	return st, nil
}

// overlaySize is how many bytes of the host's disk the overlay takes.
func (s *sentry) overlaySize() int64 {
	var st unix.Stat_t
	if unix.Stat(filepath.Join(s.dir, overlayName), &st) != nil {
		return 0 // it goes with the sentry
	}
	return st.Blocks * 512
}
