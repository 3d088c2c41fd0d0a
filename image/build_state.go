package image

import (
	"path"
	"slices"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// state is where a stage stands: a root with layers still to be applied, and
// the configuration so far.
type state struct {
	root     sandbox.Root
	layers   []string // digests of plain tar files in blobs/, lowest first
	config   Config
	platform string
	key      string   // hash of all that led here
	args     []string // ARGs of the stage, KEY=value
	cmdSet   bool     // CMD was set in this stage
	noCache  bool
}

// sameFiles reports whether two states have the same files.
func (s *state) sameFiles(o *state) bool {
	return s.root.Digest == o.root.Digest && slices.Equal(s.layers, o.layers)
}

// expand fills variables in and removes quotes.
func (s *state) expand(step Step) (Step, error) {
	if !step.Raw {
		return step, nil
	}
	step.Raw = false
	lookup := func(name string) (string, bool) {
		if v, ok := getEnv(s.config.Env, name); ok {
			return v, true
		}
		return getEnv(s.args, name)
	}
	step.Args = slices.Clone(step.Args)
	for _, word := range []*string{&step.From, &step.Chown} {
		var err error
		if *word, err = expandWord(*word, lookup); err != nil {
			return step, err
		}
	}
	for i := range step.Args {
		var err error
		if step.Args[i], err = expandWord(step.Args[i], lookup); err != nil {
			return step, err
		}
	}
	return step, nil
}

// configure applies a step that changes nothing but the configuration.
func (s *state) configure(step Step) error {
	c := &s.config
	switch step.Op {
	case OpEnv, OpLabel:
		for _, pair := range step.Args {
			key, value, ok := strings.Cut(pair, "=")
			if !ok || key == "" {
				return invalid("%q is not of the form KEY=value", pair)
			}
			if step.Op == OpEnv {
				c.Env = setEnv(c.Env, key, value)
			} else {
				c.Labels[key] = value
			}
		}
	case OpUser:
		c.User = step.Args[0]
	case OpCmd:
		c.Cmd, s.cmdSet = s.argv(step), true
	case OpEntrypoint:
		c.Entrypoint = s.argv(step)
		if !s.cmdSet {
			c.Cmd = nil // it was meant for another entry point
		}
	case OpExpose:
		for _, port := range step.Args {
			if !strings.Contains(port, "/") {
				port += "/tcp"
			}
			if !slices.Contains(c.ExposedPorts, port) {
				c.ExposedPorts = append(c.ExposedPorts, port)
			}
		}
		slices.Sort(c.ExposedPorts)
	case OpShell:
		c.Shell = step.Args
	default:
		return unsupported("unknown operation %q", step.Op)
	}
	return nil
}

// argv is the command of a step, with the shell in front where it wants one.
func (s *state) argv(step Step) []string {
	if step.Exec || len(step.Args) == 0 {
		return step.Args
	}
	shell := s.config.Shell
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(shell), strings.Join(step.Args, " "))
}

// dir is the working directory, or where a relative path leads from there.
func (s *state) dir(rel string) string {
	base := "/" + s.config.WorkingDir
	if path.IsAbs(rel) {
		base = "/"
	}
	return path.Join(base, rel)
}
