package microvm

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/prefetch"
	"github.com/atoll-run/atoll/runtime/supervisor"
)

const (
	// modelName is the file with what was known of a snapshot's restores when it was
	// taken, from its parents: a part of the snapshot that does not change.
	modelName = "prefetch"
	// learnedName is the file beside it with what was learned since.
	learnedName = "prefetch.learned"
	// modelLimit bounds the size of either, in bytes.
	modelLimit = 16 * prefetch.MaxPages
)

// early is how long after a restore a page counts as needed soon.
const early = 5 * time.Second

// readModel reads what is known of the restores of the snapshot in dir. A model is
// no more than a hint: one that cannot be read is none.
func (r *Runtime) readModel(dir string) prefetch.Model {
	for _, name := range []string{learnedName, modelName} {
		f, err := openLeaf(filepath.Join(dir, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var data []byte
		var m prefetch.Model
		if err == nil {
			data, err = io.ReadAll(io.LimitReader(f, modelLimit))
			f.Close()
		}
		if err == nil {
			m, err = prefetch.Parse(data)
		}
		if err == nil {
			return m
		}
		r.log.Warn("what was learned of a snapshot's restores is lost", "snapshot", dir, "file", name, "err", err)
	}
	return prefetch.Model{}
}

// writeModel replaces a model. Losing it with the host's power is no harm.
func writeModel(path string, m prefetch.Model) error {
	data, err := m.AppendBinary(nil)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// learn adds what the machine needed since it was restored to what is known of its
// snapshot, once for each pager: pages that a machine before it brought in, another
// one does not ask for.
func (r *Runtime) learn(v *vm) {
	select {
	case <-v.machine.Ended(): // what it touched is no longer known
		return
	default:
	}
	if v.paged == nil || v.from == "" {
		return
	}
	v.paged.once.Do(func() {
		trace, err := r.needed(v)
		if err == nil && len(trace) > 0 {
			m := r.readModel(v.from)
			m.Learn(trace)
			err = errors.Join(writeModel(filepath.Join(v.from, learnedName), m), writeModel(filepath.Join(v.dir, modelName), m))
		}
		// The snapshot or the machine may be gone by now.
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			r.log.Warn("learning from a restore", "snapshot", v.from, "err", err)
		}
	})
}

// needed returns the pages that the machine needed so far, in about the order of
// their first touch: those that were foreseen, in the order of the plan, and then
// those that had to be asked for.
func (r *Runtime) needed(v *vm) ([]uint32, error) {
	ctx, cancel := context.WithTimeout(r.pagers.ctx, answerTimeout)
	defer cancel()
	asked, err := v.paged.Trace(ctx)
	if err != nil {
		return nil, err
	}
	runs, err := v.machine.Touched()
	if err != nil {
		return nil, err
	}
	touched := make(map[uint32]bool)
	for _, run := range runs {
		for p := run.First; p-run.First < run.Count; p++ {
			touched[p] = true
		}
	}
	for _, p := range asked {
		delete(touched, p)
	}
	var trace []uint32
	for _, p := range v.paged.plan {
		if touched[p] {
			trace = append(trace, p)
		}
	}
	return append(trace, asked...), nil
}

// answerTimeout bounds how long a pager may take to tell what it was asked for.
const answerTimeout = 5 * time.Second

// inherit puts what is known of the restores of the snapshot that the machine came
// from into a new one, dir.
func (r *Runtime) inherit(b *box, dir string) error {
	if _, err := os.Stat(filepath.Join(b.Dir, modelName)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	parent := r.readModel(b.Dir)
	m := parent.Child()
	data, err := m.AppendBinary(nil)
	if err != nil {
		return err
	}
	return supervisor.WriteSynced(filepath.Join(dir, modelName), data)
}
