package gvisor

import (
	"context"
	"errors"
	"fmt"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// record is what a later process must know of a sandbox to take it over.
type record struct {
	supervisor.Base
	Sentry *process.Process `json:"sentry,omitempty"`
	Gofer  *process.Process `json:"gofer,omitempty"`
	Images images           `json:"images"`
}

// Complete reports whether the record names the processes of a sandbox that has some.
func (r *record) Complete() bool { return r.State == sandbox.Error || r.Sentry != nil }

// shape is what the sandbox's sentry is told at boot.
func (r *record) shape() shape {
	return shape{root: r.Spec.Root.Path, images: r.Images, res: r.Resources}
}

// images names the images of ours that a sandbox uses, in Runtime.images.
type images struct {
	Agent string `json:"agent"`
	Host  string `json:"host,omitempty"` // for RootHost
}

// list returns the names.
func (i images) list() []string {
	if i.Host == "" {
		return []string{i.Agent}
	}
	return []string{i.Agent, i.Host}
}

// boxes are a runtime's sandboxes, and box is one.
type (
	boxes = supervisor.Supervisor[*record, *sentry]
	box   = supervisor.Box[*record, *sentry]
)

// takeOver takes hold of the processes of a sandbox that an earlier process made.
func (r *Runtime) takeOver(b *box) (*sentry, error) {
	rec := b.Record()
	s := &sentry{dir: b.Dir, group: r.boxes.Groups.Group(rec.Group), proc: rec.Sentry, gofer: rec.Gofer}
	if err := s.proc.Open(); err != nil {
		return nil, err
	}
	if s.gofer != nil {
		if err := s.gofer.Open(); err != nil {
			return nil, errors.Join(err, s.proc.Close())
		}
	}
	return s, nil
}

// Wait returns when the sentry has ended.
func (s *sentry) Wait(ctx context.Context) error { return s.proc.Wait(ctx) }

// Ending reports whether the sentry has ended or is about to.
func (s *sentry) Ending() bool { return s.proc.Ending() }

// Group holds the sentry, its stubs and the gofer.
func (s *sentry) Group() *cgroup.Group { return s.group }

// Cause says why the sentry is no more.
func (s *sentry) Cause() string {
	if words := s.lastWords(); words != nil {
		return fmt.Sprintf("the sentry failed: %v", words)
	}
	return "the sandbox ended: its first process exited or its sentry was killed"
}
