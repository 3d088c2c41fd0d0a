package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
)

// launch is everything that starting a process takes, decided.
type launch struct {
	path string // of the executable
	argv []string
	env  []string
	dir  string
	acct account
}

// plan decides what to run. A missing command is an error that wraps
// os.ErrNotExist, one that may not be executed wraps os.ErrPermission.
func (s *settings) plan(config *processpb.ProcessConfig, acct account) (launch, error) {
	dir, err := s.resolve(config.GetCwd(), acct)
	if err != nil {
		return launch{}, err
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		if config.GetCwd() != "" {
			return launch{}, fmt.Errorf("%w: cwd '%s' does not exist", errBadCwd, dir)
		}
		dir = "/" // an account without a home directory can still run things
	}
	env := s.environment()
	base := map[string]string{
		"PATH": os.Getenv("PATH"), "HOME": acct.home, "USER": acct.name, "LOGNAME": acct.name, "SHELL": acct.shell,
	}
	if base["PATH"] == "" {
		base["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	for _, extra := range []map[string]string{env, config.GetEnvs()} {
		for k, v := range extra {
			base[wire.DecodeName(k)] = wire.DecodeName(v)
		}
	}
	l := launch{dir: dir, acct: acct}
	for _, arg := range append([]string{config.GetCmd()}, config.GetArgs()...) {
		l.argv = append(l.argv, wire.DecodeName(arg))
	}
	if l.path, err = findCommand(l.argv[0], base["PATH"], dir); err != nil {
		return launch{}, err
	}
	for k, v := range base {
		l.env = append(l.env, k+"="+v)
	}
	for _, text := range append(l.env, l.argv...) {
		if strings.ContainsRune(text, 0) {
			return launch{}, errors.New("command or environment contains a NUL byte")
		}
	}
	return l, nil
}

var errBadCwd = errors.New("bad working directory")

// findCommand resolves a command as a shell would, in the process's own PATH
// and working directory rather than ours.
func findCommand(cmd, path, dir string) (string, error) {
	if cmd == "" {
		return "", errors.New("no command given")
	}
	candidates := []string{}
	if strings.Contains(cmd, "/") {
		if !filepath.IsAbs(cmd) {
			cmd = filepath.Join(dir, cmd)
		}
		candidates = append(candidates, cmd)
	} else {
		for d := range strings.SplitSeq(path, ":") {
			if !filepath.IsAbs(d) {
				d = filepath.Join(dir, d)
			}
			candidates = append(candidates, filepath.Join(d, cmd))
		}
	}
	err := fmt.Errorf("command not found: %s: %w", cmd, os.ErrNotExist)
	for _, c := range candidates {
		info, statErr := os.Stat(c)
		switch {
		case statErr != nil:
		case info.IsDir() || info.Mode()&0o111 == 0:
			err = fmt.Errorf("command cannot be executed: %s: %w", c, os.ErrPermission)
		default:
			return c, nil
		}
	}
	return "", err
}
