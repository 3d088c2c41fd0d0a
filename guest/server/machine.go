package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/guest/wire"
)

// This file answers the calls that only the maker of the machine can make, on
// serial.MachinePort. They need no token, which the runtime does not know.
//
//	POST /machine         wire.Machine; 204 when all is done
//	GET  /load            wire.MachineLoad
//	GET  /changes         what was written to the root, as an OCI layer

// ChangesFunc writes what was changed in the root as an OCI layer.
type ChangesFunc func(ctx context.Context, w io.Writer) error

func (s *Server) machineHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /machine", s.machine)
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

func (s *Server) machine(w http.ResponseWriter, r *http.Request) {
	var in wire.Machine
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in); err != nil {
		writeError(w, http.StatusBadRequest, "the body is not valid JSON: "+err.Error())
		return
	}
	if in.Hostname != "" && !validHostname(in.Hostname) || len(in.Entropy) > maxEntropy || in.Pids < 0 {
		writeError(w, http.StatusBadRequest, "hostname, entropy or pids out of bounds")
		return
	}
	if err := errors.Join(identify(in), s.limitPids(in.Pids)); err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// identify makes the machine what in says. The random numbers come first: what
// follows may use them.
func identify(in wire.Machine) error {
	var errs []error
	if len(in.Entropy) > 0 {
		errs = append(errs, addEntropy(in.Entropy))
	}
	if in.Time != nil {
		errs = append(errs, setClock(*in.Time))
	}
	if in.Hostname != "" {
		errs = append(errs, setHostname(in.Hostname))
	}
	if in.Network != nil {
		errs = append(errs, configure(*in.Network))
		if in.Network.Resolver.IsValid() {
			errs = append(errs, os.WriteFile("/etc/resolv.conf", fmt.Appendf(nil, "nameserver %s\n", in.Network.Resolver), 0o644))
		}
	}
	return errors.Join(errs...)
}

// pidsReserve is how many of the processes and threads that the kernel can have at
// all are kept for itself and for the agent.
const pidsReserve = 200

// limitPids bounds processes and threads but the agent's own. 0 changes nothing.
func (s *Server) limitPids(limit int) error {
	if limit == 0 {
		return nil
	}
	if s.PidsMax == nil {
		return errors.New("this machine's kernel cannot bound processes: it has no control groups for them")
	}
	text, err := os.ReadFile("/proc/sys/kernel/threads-max")
	if err != nil {
		return err
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
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
