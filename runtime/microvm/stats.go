package microvm

import (
	"context"
	"io"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// statsTimeout bounds the question to the guest for its processes.
const statsTimeout = 2 * time.Second

// Stats reads what the sandbox uses now.
func (r *Runtime) Stats(ctx context.Context, id string) (sandbox.Stats, error) {
	const op = "microvm.Stats"
	b, err := r.boxes.Find(op, id)
	if err != nil {
		return sandbox.Stats{}, err
	}
	v, err := b.Live(op, sandbox.Running, sandbox.Paused)
	if err != nil {
		return sandbox.Stats{}, err
	}
	var rec record
	b.View(func(r *record) { rec = *r })
	res, link, layers := rec.Resources, rec.Spec.Link, rec.Origin.Layers
	st := sandbox.Stats{
		Time:        time.Now(),
		CPU:         v.group.CPU(),
		Memory:      v.group.Memory(),
		MemoryLimit: res.Memory,
		DiskLimit:   res.Disk,
		Pids:        1, // the agent
	}
	if len(rec.Origin.Base) > 0 && !rec.Origin.Shape.PC {
		layers = layers[1:] // the template's
	}
	for _, name := range layers {
		var info unix.Stat_t
		if unix.Stat(filepath.Join(b.Dir, name), &info) == nil {
			st.Disk += info.Blocks * 512
		}
	}
	if link != nil {
		if st.RxBytes, st.TxBytes, err = linkBytes(link); err != nil {
			return sandbox.Stats{}, sandbox.E(op, "", id, err)
		}
	}
	if rec.State == sandbox.Running && !v.bare {
		ctx, cancel := context.WithTimeout(ctx, statsTimeout)
		defer cancel()
		if n, err := v.processes(ctx); err == nil { // a busy guest need not answer
			st.Pids = n
		}
	}
	return st, nil
}

// Changes writes what the sandbox changed in its root as an OCI layer. The agent
// makes it: a file system that a guest has written is nothing that the host's
// kernel should mount.
func (r *Runtime) Changes(ctx context.Context, id string, w io.Writer) error {
	const op = "microvm.Changes"
	b, v, err := r.boxes.Hold(op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.Unlock()
	if b.Record().Origin.Shape.PC {
		return sandbox.Errorf(op, sandbox.Unsupported, id, "what a machine with a disk of its own has changed there cannot be told file by file")
	}
	if b.Status().State == sandbox.Paused { // it lives for as long as it takes
		if err := v.machine.Resume(ctx); err != nil {
			return sandbox.E(op, "", id, err)
		}
		defer func() {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
			defer cancel()
			if err := v.machine.Pause(clean); err != nil {
				r.log.Error("pausing a sandbox again", "sandbox", id, "err", err)
			}
		}()
	}
	g := v.maker()
	defer g.CloseIdle()
	if err := g.Changes(ctx, w); err != nil {
		return sandbox.E(op, "", id, err)
	}
	return nil
}
