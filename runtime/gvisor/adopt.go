package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/sandbox"
)

// adopt takes over what an earlier process left: sandboxes that run go on, those
// that died are kept as lost, and those half made are removed.
func (r *Runtime) adopt() error {
	const op = "gvisor.New"
	dirs, err := os.ReadDir(filepath.Join(r.cfg.Dir, "s"))
	if err != nil {
		return sandbox.E(op, sandbox.Internal, r.cfg.Dir, err)
	}
	known := make(map[string]bool)
	for _, d := range dirs {
		b := &box{dir: filepath.Join(r.cfg.Dir, "s", d.Name())}
		if err := b.load(d.Name()); err != nil {
			r.log.Warn("removing a sandbox that was never complete", "sandbox", d.Name(), "err", err)
			if err := r.groups.Group(d.Name()).Remove(); err != nil {
				return sandbox.E(op, "", d.Name(), err)
			}
			if err := os.RemoveAll(b.dir); err != nil {
				return sandbox.E(op, sandbox.Internal, d.Name(), err)
			}
			continue
		}
		known[b.rec.Group] = true
		r.boxes[d.Name()] = b
		r.takeOver(b)
	}
	for _, name := range r.groups.List() {
		if !known[name] {
			r.log.Warn("removing a control group without a sandbox", "group", name)
			if err := r.groups.Group(name).Remove(); err != nil {
				return sandbox.E(op, "", name, err)
			}
		}
	}
	return nil
}

// load reads the record of the sandbox that must be called id.
func (b *box) load(id string) error {
	data, err := os.ReadFile(filepath.Join(b.dir, recordName))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &b.rec); err != nil {
		return err
	}
	if b.rec.Spec.ID != id || b.rec.State != sandbox.Error && b.rec.Sentry == nil {
		return fmt.Errorf("damaged record of sandbox %q", b.rec.Spec.ID)
	}
	return nil
}

// takeOver takes hold of an adopted sandbox's processes, or declares it lost.
func (r *Runtime) takeOver(b *box) {
	if b.rec.State == sandbox.Error {
		return
	}
	s := &sentry{dir: b.dir, group: r.groups.Group(b.rec.Group), proc: b.rec.Sentry, gofer: b.rec.Gofer}
	err := s.proc.Open()
	if err == nil && s.gofer != nil {
		err = s.gofer.Open()
		if err != nil {
			s.gofer = nil
		}
	}
	if err == nil {
		b.sentry = s
		r.watch(b, s)
		return
	}
	b.rec.State, b.rec.Reason = sandbox.Error, s.causeOfDeath()
	if err := errors.Join(b.save(), s.group.Remove()); err != nil {
		r.log.Error("cannot clear up after a lost sandbox", "sandbox", b.rec.Spec.ID, "err", err)
	}
}
