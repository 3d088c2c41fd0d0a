package server

import (
	"cmp"
	"crypto/subtle"
	"errors"
	"maps"
	"path/filepath"
	"strings"
	"sync"

	"github.com/atoll-run/atoll/guest/wire"
)

// settings is what /init gave the guest.
type settings struct {
	mu      sync.RWMutex
	token   string            // empty: not set yet, every call is allowed
	env     map[string]string // never nil
	user    string            // default user; may be empty
	workdir string            // default working directory; may be empty: the user's home
}

// allows reports whether the token given by a caller opens the guest.
func (s *settings) allows(token string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.token == "" || subtle.ConstantTimeCompare([]byte(token), []byte(s.token)) == 1
}

// apply takes over what an /init gives. The caller proved that it may.
func (s *settings) apply(in wire.Init) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.EnvVars != nil {
		s.env = in.EnvVars
	}
	if in.AccessToken != nil && *in.AccessToken != "" {
		s.token = *in.AccessToken
	}
	if in.DefaultUser != nil {
		s.user = *in.DefaultUser
	}
	if in.DefaultWorkdir != nil {
		s.workdir = *in.DefaultWorkdir
	}
}

// environment returns a copy of the variables that every process gets.
func (s *settings) environment() map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.env)
}

// account finds whom a call acts for; spec is empty for the default user. The
// default falls back to "user" and then to our own account, since images need
// not have the user that a template names. Where we cannot become anybody else,
// every name means our own account.
func (s *settings) account(spec string) (account, error) {
	known := loadAccounts()
	if !canSwitch() {
		return self(known), nil
	}
	if spec != "" {
		return known.lookup(spec)
	}
	s.mu.RLock()
	candidates := []string{s.user, "user"}
	s.mu.RUnlock()
	for _, name := range candidates {
		if name == "" {
			continue
		}
		if acct, err := known.lookup(name); err == nil {
			return acct, nil
		}
	}
	return self(known), nil
}

// resolve turns a path from the wire into an absolute one: "~" is the home, a
// relative path starts at the home, and no path at all is the default working
// directory if there is one. E2B's clients count on root's files landing in
// root's home whatever the image's working directory.
func (s *settings) resolve(path string, acct account) (string, error) {
	path = wire.DecodeName(path)
	if strings.ContainsRune(path, 0) {
		return "", errors.New("path contains a NUL byte")
	}
	if path == "~" || strings.HasPrefix(path, "~/") {
		path = acct.home + path[1:]
	}
	if !filepath.IsAbs(path) {
		base := acct.home
		if path == "" {
			s.mu.RLock()
			base = cmp.Or(s.workdir, base)
			s.mu.RUnlock()
		}
		path = filepath.Join(base, path)
	}
	return filepath.Clean(path), nil
}
