package microvm

import "context"

// Abandon lets go of everything in this process as a crash would: without a word
// to the sandboxes.
func (r *Runtime) Abandon() { _ = r.Close() }

// OnStep has f called between the steps of a snapshot and a fork.
func (r *Runtime) OnStep(f func(string)) { r.step = f }

// MonitorPID returns the process of a sandbox that runs.
func (r *Runtime) MonitorPID(id string) int {
	b, err := r.boxes.Find("test", id)
	if err != nil {
		return -1
	}
	v, err := b.Live("test", "running", "paused")
	if err != nil {
		return -1
	}
	return v.machine.Process().PID
}

// Prefix is the default name of the parent control group.
func Prefix(dir string) string {
	cfg := Config{Dir: dir}
	cfg.fill()
	return cfg.Prefix
}

// paged returns the pager of a sandbox that runs, nil when it has none.
func (r *Runtime) paged(id string) *paged {
	b, err := r.boxes.Find("test", id)
	if err != nil {
		return nil
	}
	v, err := b.Live("test", "running", "paused")
	if err != nil {
		return nil
	}
	return v.paged
}

// PagerPID returns the process that serves a sandbox's memory, -1 when all is there.
func (r *Runtime) PagerPID(id string) int {
	if p := r.paged(id); p != nil {
		return p.Process.PID
	}
	return -1
}

// Asked returns the pages that a sandbox had to ask for since it was restored.
func (r *Runtime) Asked(ctx context.Context, id string) ([]uint32, error) {
	return r.paged(id).Trace(ctx)
}

// Plan returns the pages that would be fetched ahead for the snapshot in dir.
func (r *Runtime) Plan(dir string) []uint32 {
	m := r.readModel(dir)
	return m.Plan()
}

// ShareMemory has guests give and take as on a host with so much memory.
func (r *Runtime) ShareMemory(ctx context.Context, total, available int64) {
	r.balloons.round(ctx, memoryInfo{total: total, available: available})
}

// Given is how much of its memory a sandbox's guest may use now.
func (r *Runtime) Given(ctx context.Context, id string) (int64, error) {
	b, err := r.boxes.Find("test", id)
	if err != nil {
		return 0, err
	}
	v, err := b.Live("test", "running")
	if err != nil {
		return 0, err
	}
	return v.machine.Given(ctx)
}
