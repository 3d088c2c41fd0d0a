package microvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// record is what a later process must know of a sandbox to take it over.
type record struct {
	supervisor.Base
	Process *process.Process `json:"process,omitempty"`
	Tap     string           `json:"tap,omitempty"`
	// Pager serves the machine's memory, in a control group of its own; nil: all of
	// the memory is there.
	Pager      *process.Process `json:"pager,omitempty"`
	PagerGroup string           `json:"pagerGroup,omitempty"`
	// Origin is what the machine maps and which layers its disk has by now; the
	// uppermost is being written.
	Origin origin `json:"origin"`
}

// Complete reports whether the record tells of a machine with a disk.
func (r *record) Complete() bool {
	return (r.State == sandbox.Error || r.Process != nil) && len(r.Origin.Layers) > 0
}

// boxes are a runtime's sandboxes, and box is one.
type (
	boxes = supervisor.Supervisor[*record, *vm]
	box   = supervisor.Box[*record, *vm]
)

// adoptTimeout bounds how long a machine may take to answer who took it over.
const adoptTimeout = 10 * time.Second

// takeOver takes hold of the machine of a sandbox that an earlier process made.
func (r *Runtime) takeOver(ctx context.Context, b *box) (*vm, error) {
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	rec := b.Record()
	v := &vm{dir: b.Dir, group: r.boxes.Groups.Group(rec.Group), tap: rec.Tap, bare: rec.Origin.Shape.Bare, link: rec.Spec.Link}
	var err error
	if v.machine, err = r.driver.Adopt(ctx, b.Dir, rec.Process); err != nil {
		return nil, err
	}
	if rec.Pager != nil {
		if v.paged, err = r.pagers.adopt(rec.PagerGroup, rec.Pager); err != nil {
			return nil, errors.Join(err, v.machine.Kill())
		}
	}
	if rec.State == sandbox.Running {
		// Its former owner may have died while the machine stood still for a snapshot, or was being sent.
		if err := v.machine.Stay(ctx); err != nil {
			return nil, errors.Join(err, v.machine.Kill())
		}
	}
	return v, nil
}

// Wait returns when the machine has ended.
func (v *vm) Wait(ctx context.Context) error {
	select {
	case <-v.machine.Ended():
		_ = v.keepConsole(context.WithoutCancel(ctx)) // its last words; the end is news without them, too
		return nil
	case <-v.pagerEnded():
		return nil
	case <-ctx.Done():
		v.hangUp()
		return errors.Join(ctx.Err(), v.machine.Close())
	}
}

// Ending reports whether the machine has ended or its monitor is about to.
func (v *vm) Ending() bool {
	select {
	case <-v.machine.Ended():
		return true
	default:
		return v.machine.Process().Ending() || v.paged != nil && v.paged.Process.Ending()
	}
}

// Group holds the machine's monitor.
func (v *vm) Group() *cgroup.Group { return v.group }

// Cause says why the machine ended.
func (v *vm) Cause() string {
	if why := v.machine.Cause(); why != "" {
		return why
	}
	if why := v.lostMemory(); why != "" {
		return why
	}
	return "the machine's monitor ended or was killed"
}

// explain says that the machine ended, if that is why something failed.
func (v *vm) explain(err error) error {
	select {
	case <-v.machine.Ended():
		return sandbox.E("reach guest", sandbox.Unavailable, "", fmt.Errorf("%s: %w", v.Cause(), err))
	default:
		return err
	}
}
