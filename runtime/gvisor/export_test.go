package gvisor

// Abandon lets go of everything in this process as a crash would: without a word
// to the sandboxes.
func (r *Runtime) Abandon() {
	r.mu.Lock()
	for _, b := range r.boxes {
		b.detach()
	}
	r.closed = true
	close(r.stop)
	r.mu.Unlock()
	r.watches.Wait()
	r.lock.Close()
}

// SentryPID returns the process of a sandbox that runs.
func (r *Runtime) SentryPID(id string) int {
	b, err := r.box("test", id)
	if err != nil {
		return -1
	}
	s, err := b.live("test", "running", "paused")
	if err != nil {
		return -1
	}
	return s.proc.PID
}

// Prefix is the default name of the parent control group.
func Prefix(dir string) string { return prefix(dir) }
