package gvisor

// Abandon lets go of everything in this process as a crash would: without a word
// to the sandboxes.
func (r *Runtime) Abandon() {
	r.boxes.Shut()
	_ = r.letGo()
}

// SentryPID returns the process of a sandbox that runs.
func (r *Runtime) SentryPID(id string) int {
	b, err := r.boxes.Find("test", id)
	if err != nil {
		return -1
	}
	s, err := b.Live("test", "running", "paused")
	if err != nil {
		return -1
	}
	return s.proc.PID
}

// Prefix is the default name of the parent control group.
func Prefix(dir string) string { return prefix(dir) }
