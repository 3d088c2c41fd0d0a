package server

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
)

const (
	maxEntropy = 4096 // bytes
	// Smaller differences are left to the guest: a step is worse than they are.
	clockSlack = 20 * time.Millisecond
)

// validHostname reports whether name may be a host name: letters, digits, dots
// and hyphens, at most the 64 bytes that the kernel takes.
func validHostname(name string) bool {
	for i, c := range []byte(name) {
		alphanumeric := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		inside := i > 0 && i < len(name)-1 && (c == '.' || c == '-')
		if !alphanumeric && !inside {
			return false
		}
	}
	return name != "" && len(name) <= 64
}

// init answers POST /init. Whoever comes first may call it, which is the node,
// before anything else runs here. Later callers must know the token in force,
// by header or by sending the same one again: so the node can give a fork its
// own token by showing the old one, and no process in the sandbox can.
func (s *Server) init(w http.ResponseWriter, r *http.Request) {
	var in wire.Init
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in)
	if err != nil && !errors.Is(err, io.EOF) {
		writeError(w, http.StatusBadRequest, "the body is not valid JSON: "+err.Error())
		return
	}
	again := in.AccessToken != nil && s.settings.allows(*in.AccessToken)
	if !again && !s.settings.allows(r.Header.Get(wire.HeaderToken)) {
		writeError(w, http.StatusUnauthorized, "the access token is already set: call with the one in force")
		return
	}
	if in.Hostname != "" && !validHostname(in.Hostname) {
		writeError(w, http.StatusBadRequest, "hostname: letters, digits, dots and hyphens, at most 64")
		return
	}
	if len(in.Entropy) > maxEntropy {
		writeError(w, http.StatusBadRequest, "entropy: at most 4096 bytes")
		return
	}
	s.settings.apply(in)
	s.repair(in)
	if !in.Continues {
		s.lasting.Drop()
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// repair makes the sandbox its own again after a restore. What the kernel does
// not let us do is not our job: then the runtime outside does it. An agent that
// is neither PID 1 nor alone on its kernel shares with its host what it would
// change, and leaves it.
func (s *Server) repair(in wire.Init) {
	attempt := func(what string, err error) {
		if err == nil || errors.Is(err, os.ErrPermission) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EROFS) {
			return
		}
		s.Log.Warn("init: could not "+what, "error", err)
	}
	if in.Timestamp != nil && s.Machine {
		attempt("set the clock", setClock(*in.Timestamp))
	}
	if len(in.Entropy) > 0 {
		attempt("add entropy", s.own.addEntropy(in.Entropy))
	}
	if in.Hostname != "" && s.PID1 {
		attempt("set the host name", s.own.setHostname(in.Hostname))
	}
	if s.PID1 {
		attempt("leave the sandbox's identity", leaveIdentity(identityDir, in.EnvVars))
	}
	if in.CABundle != "" && s.PID1 {
		attempt("add the certificate authority", addAuthority(in.CABundle))
	}
}

func setClock(t time.Time) error {
	if d := time.Until(t); d.Abs() < clockSlack {
		return nil
	}
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// authorityBundles are where distributions keep the trusted certificates.
var authorityBundles = []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"}

// addAuthority appends a PEM certificate to the bundle that the image has, once.
func addAuthority(pem string) error {
	for _, path := range authorityBundles {
		bundle, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil || strings.Contains(string(bundle), strings.TrimSpace(pem)) {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("\n" + strings.TrimSpace(pem) + "\n")
		return errors.Join(err, f.Close())
	}
	return nil // an image without TLS
}
