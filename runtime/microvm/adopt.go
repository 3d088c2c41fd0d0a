package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// adoptTimeout bounds how long a machine may take to answer who took it over.
const adoptTimeout = 10 * time.Second

// adopt takes over what an earlier process left: machines that run go on, those
// that ended are kept as lost, and those half made are removed.
func (r *Runtime) adopt(ctx context.Context) error {
	const op = "microvm.New"
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
		r.takeOver(ctx, b)
	}
	for _, name := range r.groups.List() {
		if !known[name] {
			r.log.Warn("removing a control group without a sandbox", "group", name)
			if err := r.groups.Group(name).Remove(); err != nil {
				return sandbox.E(op, "", name, err)
			}
		}
	}
	return r.sweepTemplates()
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
	if b.rec.Spec.ID != id || b.rec.State != sandbox.Error && b.rec.Process == nil || len(b.rec.Origin.Layers) == 0 {
		return fmt.Errorf("damaged record of sandbox %q", b.rec.Spec.ID)
	}
	return nil
}

// takeOver takes hold of an adopted sandbox's machine, or declares it lost.
func (r *Runtime) takeOver(ctx context.Context, b *box) {
	if b.rec.State == sandbox.Error {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	v := &vm{dir: b.dir, group: r.groups.Group(b.rec.Group), tap: b.rec.Tap}
	m, err := r.driver.Adopt(ctx, b.dir, b.rec.Process)
	if err == nil && b.rec.State == sandbox.Running {
		// Its former owner may have died while the machine stood still for a snapshot.
		if err = m.Resume(ctx); err != nil {
			err = errors.Join(err, m.Kill())
		}
	}
	if err == nil {
		v.machine = m
		b.mu.Lock()
		defer b.mu.Unlock()
		b.vm = v
		r.watch(b, v)
		return
	}
	r.log.Warn("a sandbox was lost", "sandbox", b.rec.Spec.ID, "err", err)
	b.rec.State, b.rec.Reason = sandbox.Error, "the machine's monitor ended or was killed"
	if v.group.OutOfMemory() > 0 {
		b.rec.Reason = "out of memory: the machine's monitor needed more than its limit and the kernel ended it"
	}
	if err := errors.Join(b.save(), v.group.Remove()); err != nil {
		r.log.Error("cannot clear up after a lost sandbox", "sandbox", b.rec.Spec.ID, "err", err)
	}
}

// sweepTemplates removes templates that were never finished. Those of other
// processes may be in the making.
func (r *Runtime) sweepTemplates() error {
	const op = "microvm.New"
	dir := filepath.Join(r.cfg.Cache, "templates")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return sandbox.E(op, sandbox.Internal, dir, err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || len(e.Name()) < len(newPrefix) || e.Name()[:len(newPrefix)] != newPrefix || time.Since(info.ModTime()) < 2*templateTimeout {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return sandbox.E(op, sandbox.Internal, dir, err)
		}
	}
	return nil
}
