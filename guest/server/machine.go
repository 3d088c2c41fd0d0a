package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/atoll-run/atoll/guest/wire"
)

// This file answers what only the maker of the machine can ask: one question on the
// serial port, wire.Machine, and these calls on serial.MachinePort. They need no
// token, which the runtime does not know.
//
//	GET  /load            wire.MachineLoad
//	GET  /changes         what was written to the root, as an OCI layer

// ChangesFunc writes what was changed in the root as an OCI layer.
type ChangesFunc func(ctx context.Context, w io.Writer) error

func (s *Server) machineHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /changes", s.changes)
	mux.HandleFunc("GET /load", s.load)
	return mux
}

// load answers GET /load.
func (s *Server) load(w http.ResponseWriter, _ *http.Request) {
	const kthreadd = 2 // the parent of all threads of the kernel
	var out wire.MachineLoad
	for _, p := range processTable() {
		if p.pid != kthreadd && p.parent != kthreadd {
			out.Processes++
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the caller may have gone
}

// becomeMachine answers the question on the serial port, in a straight line: an
// emulated clone has translated none of this yet, and its maker waits.
func (s *Server) becomeMachine(question []byte, rest func()) (answer []byte) {
	in, err := wire.ParseMachine(question)
	if err == nil && (in.Hostname != "" && !validHostname(in.Hostname) || len(in.Entropy) > maxEntropy) {
		err = errors.New("hostname or entropy out of bounds")
	}
	if err == nil {
		err = s.identify(in)
	}
	if err == nil {
		err = s.limitPids(in.Pids)
	}
	if err != nil {
		return []byte(err.Error())
	}
	if in.Rest && rest != nil {
		rest()
	}
	return nil
}

// identify makes the machine what in says. The random numbers come first: what
// follows may use them.
func (s *Server) identify(in wire.Machine) error {
	var errs []error
	if len(in.Entropy) > 0 {
		errs = append(errs, s.own.addEntropy(in.Entropy))
	}
	if !in.Time.IsZero() {
		errs = append(errs, setClock(in.Time))
	}
	if in.Hostname != "" {
		errs = append(errs, s.own.setHostname(in.Hostname))
	}
	if in.Network != nil {
		errs = append(errs, configure(*in.Network))
		if in.Network.Resolver.IsValid() {
			errs = append(errs, s.own.setResolver(in.Network.Resolver.String()))
		}
	}
	return errors.Join(errs...)
}

// pidsReserve is how many of the processes and threads that the kernel can have at
// all are kept for itself and for the agent.
const pidsReserve = 200

// maxThreads is how many processes and threads the kernel can have, which is for good
// when the machine has booted.
var maxThreads = sync.OnceValues(func() (int, error) {
	text, err := os.ReadFile("/proc/sys/kernel/threads-max")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
})

// limitPids bounds processes and threads but the agent's own. 0 changes nothing.
func (s *Server) limitPids(limit int) error {
	if limit == 0 {
		return nil
	}
	if s.PidsMax == nil {
		return errors.New("this machine's kernel cannot bound processes: it has no control groups for them")
	}
	most, err := maxThreads()
	if err != nil {
		return err
	}
	_, err = s.PidsMax.WriteAt([]byte(strconv.Itoa(min(limit, max(most-pidsReserve, 1)))), 0)
	return err
}

// changes answers GET /changes.
func (s *Server) changes(w http.ResponseWriter, r *http.Request) {
	if s.Changes == nil {
		writeError(w, http.StatusNotFound, "this machine has no overlay")
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if err := s.Changes(r.Context(), w); err != nil {
		s.Log.Warn("changes", "error", err)
		panic(http.ErrAbortHandler) // the stream must not look whole
	}
}
