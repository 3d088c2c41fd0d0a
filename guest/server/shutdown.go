package server

import (
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"
)

const (
	graceDefault = 10 * time.Second
	graceMax     = 600 // seconds
	killRounds   = 100 // of looking for processes that were forked meanwhile
	pollInterval = 20 * time.Millisecond
)

// shutdown answers POST /shutdown.
func (s *Server) shutdown(w http.ResponseWriter, r *http.Request) {
	grace := graceDefault
	if text := r.URL.Query().Get("grace"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 || n > graceMax {
			writeError(w, http.StatusBadRequest, "grace must be seconds from 0 to 600")
			return
		}
		grace = time.Duration(n) * time.Second
	}
	s.Terminate(grace)
	w.WriteHeader(http.StatusNoContent)
	_ = http.NewResponseController(w).Flush()
	s.stop.Do(func() { close(s.stopped) })
}

// Terminate ends all processes below the agent: it asks them to, and kills what
// is left after the grace.
func (s *Server) Terminate(grace time.Duration) {
	s.killTree(syscall.SIGTERM)
	for deadline := time.Now().Add(grace); time.Now().Before(deadline); time.Sleep(pollInterval) {
		if len(descendants(processTable(), os.Getpid())) == 0 {
			return
		}
	}
	for range killRounds {
		if s.killTree(syscall.SIGKILL) == 0 {
			return
		}
		time.Sleep(pollInterval)
	}
}

// killTree signals all processes below the agent and returns how many.
func (s *Server) killTree(sig syscall.Signal) int {
	s.processes.mu.Lock()
	for _, p := range s.processes.all {
		switch {
		case sig == syscall.SIGKILL:
			p.killed.Store(true)
		case p.tty != nil:
			// Shells ignore SIGTERM on a terminal and leave when it hangs up.
			_ = syscall.Kill(-p.child.pid, syscall.SIGHUP)
		}
	}
	s.processes.mu.Unlock()
	pids := descendants(processTable(), os.Getpid())
	for _, pid := range pids {
		_ = syscall.Kill(pid, sig)
	}
	return len(pids)
}
