package microvm

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
