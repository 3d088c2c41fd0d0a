package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	// manifestName is our description of a snapshot, written last: a directory
	// without it is none.
	manifestName   = "microvm.json"
	manifestFormat = 2

	// writtenDelta is the size in bytes up to which a delta is written into each
	// machine that is restored. A larger one becomes part of a memory that all of
	// them map, so that it is there once.
	writtenDelta = 16 << 20
	// maxBase bounds how many page files make a memory, and maxLayers how many
	// layers a disk has; beyond that they are merged.
	maxBase   = 4
	maxLayers = 12
)

// manifest says what a snapshot is of and what its files are.
type manifest struct {
	Format    int               `json:"format"`
	Root      sandbox.Root      `json:"root"`
	Resources sandbox.Resources `json:"resources"`
	Origin    origin            `json:"origin"`  // files are in the snapshot's directory
	Devices   string            `json:"devices"` // digest of their state
	// Ahead says that it is without what has changed of the machine: another one can be received beside it, and none restored.
	Ahead bool `json:"ahead,omitempty"`
}

// Snapshot writes the machine's whole state into dir. When that fails, the machine
// goes on as it was and dir is left empty.
func (r *Runtime) Snapshot(ctx context.Context, id, dir string, opts sandbox.SnapshotOptions) error {
	return r.boxes.Snapshot(ctx, "microvm.Snapshot", id, dir, opts, func(b *box, v *vm) error {
		if opts.Ahead && !opts.Stop {
			if done, err := r.goAhead(ctx, b, v, dir); done || err != nil {
				return err
			}
		}
		return r.snapshot(ctx, b, v, dir)
	})
}

// resumeTimeout bounds how long a machine that stood still may take to go on, or
// the other way round.
const resumeTimeout = 10 * time.Second

// snapshot does the work of Snapshot. The machine is afterwards as it was, but
// that it writes to a new layer of its disk. The box is held.
func (r *Runtime) snapshot(ctx context.Context, b *box, v *vm, dir string) error {
	if err := v.mustTell("snapshot"); err != nil {
		return err
	}
	if err := settled(b.Dir, b.Record().Origin); err != nil {
		return err
	}
	if err := r.merge(ctx, b, v); err != nil {
		return err
	}
	rec, running := b.Record(), b.Status().State == sandbox.Running
	m := manifest{Format: manifestFormat, Root: rec.Spec.Root, Resources: rec.Resources, Origin: rec.Origin}
	m.Origin.Delta = &pageFile{Name: nextPages(m.Origin.Base)}
	// The new layer is on record before it is used. One that is on record and was
	// never used is empty, and harmless.
	next, err := addLayer(b.Dir, m.Origin)
	if err != nil {
		return err
	}
	r.step("layer made")
	if err := b.Update(func(rec *record) { rec.Origin.Layers = next.Layers }); err != nil {
		return err
	}
	r.step("layer on record")
	if err := v.machine.NewLayer(ctx, rec.Origin.Shape.ownDisk(), filepath.Join(b.Dir, next.Layers[len(next.Layers)-1])); err != nil {
		return err
	}
	r.step("layer opened")
	if running {
		if err := v.machine.Pause(ctx); err != nil {
			return err
		}
	}
	err = r.freezeState(ctx, v, m.Origin, dir)
	if running {
		// Whatever happened, also to our caller, the machine must go on.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
		defer cancel()
		err = errors.Join(err, v.machine.Resume(clean))
	}
	r.step("resumed")
	if err != nil {
		return err
	}
	if err := r.finish(ctx, b, dir, &m); err != nil {
		return err
	}
	r.step("snapshot written")
	return nil
}

// nextPages is a name that no page file of a memory has.
func nextPages(base []pageFile) string {
	for i := len(base); ; i++ {
		name := fmt.Sprintf("%s%d", memoryName, i)
		if !slices.ContainsFunc(base, func(p pageFile) bool { return p.Name == name }) {
			return name
		}
	}
}

// freezeState writes what must be written while the machine stands still: o names
// the page file.
func (r *Runtime) freezeState(ctx context.Context, v *vm, o origin, dir string) error {
	r.step("paused")
	if err := v.machine.AddLayer(ctx, o.Shape.ownDisk()); err != nil {
		return err
	}
	r.step("layer added")
	if err := saveDevices(ctx, v, dir); err != nil {
		return err
	}
	r.step("devices saved")
	runs, err := v.machine.Changed()
	if err != nil {
		return err
	}
	if err := writePages(filepath.Join(dir, o.Delta.Name), o.Shape.Memory, runs, v.machine.ReadPages); err != nil {
		return err
	}
	r.step("memory written")
	return nil
}

// finish adds the files that do not change any more, syncs everything and
// describes it.
func (r *Runtime) finish(ctx context.Context, b *box, dir string, m *manifest) error {
	base, err := r.flatten(b.Dir, m.Origin, dir)
	if err != nil {
		return err
	}
	m.Origin.Base = base
	for _, name := range m.Origin.Layers {
		if err := supervisor.LinkFile(filepath.Join(dir, name), filepath.Join(b.Dir, name)); err != nil {
			return err
		}
		if err := supervisor.Sync(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := r.inherit(b, dir); err != nil {
		return err
	}
	r.step("files linked")
	if err := ctx.Err(); err != nil {
		return err
	}
	delta, err := finishPages(dir, m.Origin.Delta.Name)
	if err != nil {
		return err
	}
	m.Origin.Delta = &delta
	devices, err := os.ReadFile(filepath.Join(dir, devicesName))
	if err != nil {
		return err
	}
	m.Devices = digestOfBytes(devices)
	if err := supervisor.Sync(filepath.Join(dir, devicesName)); err != nil {
		return err
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := supervisor.WriteSynced(filepath.Join(dir, manifestName), data); err != nil {
		return err
	}
	return supervisor.Sync(dir)
}

// flatten puts the page files of a memory into dir: the same ones, or one that
// holds all of them when they have become many.
func (r *Runtime) flatten(from string, o origin, dir string) ([]pageFile, error) {
	if len(o.Base) <= maxBase {
		for _, p := range o.Base {
			if err := supervisor.LinkFile(filepath.Join(dir, p.Name), filepath.Join(from, p.Name)); err != nil {
				return nil, err
			}
		}
		return o.Base, nil
	}
	memory, err := r.memories.get(from, o.Base, o.Shape.Memory)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	p, err := dumpMemory(memory, o.Shape.Memory, dir, memoryName)
	return []pageFile{p}, err
}

// merge shortens the machine's disk when it has many layers. The box is held.
func (r *Runtime) merge(ctx context.Context, b *box, v *vm) error {
	layers, s := b.Record().Origin.Layers, b.Record().Origin.Shape
	if len(layers) < maxLayers {
		return nil
	}
	own := s.keptLayers()
	if err := v.machine.MergeLayers(ctx, s.ownDisk(), 1+own); err != nil {
		return err
	}
	// What is merged is in the uppermost layer, too, so that nothing is lost if
	// the record is not written any more.
	kept := append(slices.Clone(layers[:own]), layers[len(layers)-1])
	if err := b.Update(func(rec *record) { rec.Origin.Layers = kept }); err != nil {
		return err
	}
	for _, name := range layers[own : len(layers)-1] {
		if err := os.Remove(filepath.Join(b.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Restore makes a machine from the state in dir.
func (r *Runtime) Restore(ctx context.Context, spec sandbox.Spec, dir string) error {
	const op = "microvm.Restore"
	m, err := r.restorable(ctx, op, spec, dir)
	if err != nil {
		return err
	}
	if m.Ahead {
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "the snapshot was made for a move, and is without what the machine had changed")
	}
	return r.make(ctx, op, spec, m.Origin, func(b *box) (*vm, error) { return r.revive(ctx, b, spec, m, dir) })
}

// restorable reads the snapshot in dir, which can become what spec wants.
func (r *Runtime) restorable(ctx context.Context, op string, spec sandbox.Spec, dir string) (manifest, error) {
	if err := r.check(op, spec); err != nil {
		return manifest{}, err
	}
	m, err := readManifest(dir)
	if err != nil {
		return m, sandbox.E(op, sandbox.Invalid, spec.ID, err)
	}
	if _, err := r.prepare(ctx); err != nil {
		return m, sandbox.E(op, "", spec.ID, err)
	}
	if err := r.fits(m, spec); err != nil {
		return m, sandbox.E(op, sandbox.Invalid, spec.ID, err)
	}
	return m, nil
}

// furnish gives a box what its machine starts from: the files of a snapshot, and an empty layer of its disk.
func (r *Runtime) furnish(b *box, m manifest, from string) (o origin, err error) {
	o = m.Origin
	names := slices.Concat(o.Layers, []string{devicesName, o.Delta.Name})
	for _, p := range o.Base {
		names = append(names, p.Name)
	}
	for _, name := range names {
		if err := supervisor.LinkFile(filepath.Join(b.Dir, name), filepath.Join(from, name)); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return o, sandbox.E("read snapshot", sandbox.Invalid, "", err)
			}
			return o, err
		}
	}
	if err := r.checked(filepath.Join(b.Dir, devicesName), m.Devices); err != nil {
		return o, sandbox.E("read snapshot", sandbox.Invalid, "", err)
	}
	for _, p := range o.Base {
		if late, err := arrive.Late(filepath.Join(b.Dir, p.Name)); late || err != nil {
			continue // others wait until it is here
		}
		if err := r.keepBase(b.Dir, p); err != nil {
			r.log.Warn("keeping what machines are cloned from", "file", p.Digest, "err", err)
		}
	}
	if o, err = addLayer(b.Dir, place(o)); err != nil {
		return o, err
	}
	b.Record().Origin = o // nobody else knows the box yet
	return o, nil
}

// revive starts the machine of a snapshot.
func (r *Runtime) revive(ctx context.Context, b *box, spec sandbox.Spec, m manifest, from string) (*vm, error) {
	o, err := r.furnish(b, m, from)
	if err != nil {
		return nil, err
	}
	if err := writeSeed(b.Dir, spec); err != nil {
		return nil, err
	}
	r.step("restore prepared")
	v, err := r.awaken(ctx, b, from)
	if errors.Is(err, errDamaged) {
		return nil, sandbox.E("read snapshot", sandbox.Invalid, "", err)
	}
	if err != nil {
		return nil, err
	}
	r.step("monitor started")
	if err := v.load(ctx, o); err != nil {
		if v.lostMemory() != "" {
			err = errors.Join(err, v.paged.Cause())
		}
		if errors.Is(err, errDamaged) {
			err = sandbox.E("read snapshot", sandbox.Invalid, "", err)
		}
		return v, err
	}
	r.step("machine runs")
	return v, r.dropDelta(b)
}

// place decides where the changes of a snapshot go: into each machine's own
// memory when they are few, into the memory that all its machines map when they
// are many.
func place(o origin) origin {
	if o.Delta != nil && (o.Delta.Bytes > writtenDelta || len(o.Base) == 0) {
		o.Base, o.Delta = append(slices.Clone(o.Base), *o.Delta), nil
	}
	return o
}

// readManifest reads our part of a snapshot.
func readManifest(dir string) (m manifest, err error) {
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return m, fmt.Errorf("no snapshot of this runtime: %w", err)
	}
	return parseManifest(data)
}

// parseManifest decodes a manifest, which may come from another node.
func parseManifest(data []byte) (m manifest, err error) {
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("damaged snapshot manifest: %w", err)
	}
	if m.Format != manifestFormat {
		return m, fmt.Errorf("snapshot has format %d, this version reads %d", m.Format, manifestFormat)
	}
	if m.Origin.Delta == nil || len(m.Origin.Layers) == 0 || len(m.Origin.Base) > maxBase+1 || len(m.Origin.Layers) > maxLayers {
		return m, errors.New("damaged snapshot manifest: its files do not make a machine")
	}
	names := slices.Concat(m.Origin.Layers, []string{m.Origin.Delta.Name})
	for _, p := range m.Origin.Base {
		names = append(names, p.Name)
	}
	reserved := []string{".", "..", supervisor.RecordName, devicesName, manifestName, modelName, learnedName, seedName, consoleName, consoleName + newSuffix}
	for i, name := range names {
		if name == "" || name != filepath.Base(name) || slices.Contains(reserved, name) || slices.Contains(names[:i], name) || filepath.Ext(name) == ".sock" {
			return m, fmt.Errorf("damaged snapshot manifest: file %q", name)
		}
	}
	s := m.Origin.Shape
	if s.Memory <= 0 || s.Memory%vmm.PageSize != 0 || s.Disk <= 0 || s.CPUs < 1 {
		return m, fmt.Errorf("damaged snapshot manifest: a machine of %+v", s)
	}
	return m, nil
}

// fits says why a snapshot cannot become what spec wants.
func (r *Runtime) fits(m manifest, spec sandbox.Spec) error {
	res := spec.Resources.Or(r.cfg.Defaults)
	want := r.shapeOf(spec, res, m.Origin.Shape.Kernel) // that one is in the snapshot's memory
	switch {
	case m.Origin.Shape.Monitor != want.Monitor:
		return fmt.Errorf("the snapshot is of a machine on %s and this host has %s, which cannot go on with it; make the sandbox anew", m.Origin.Shape.Monitor, want.Monitor)
	case m.Root.Kind != spec.Root.Kind || m.Root.Digest != spec.Root.Digest:
		return fmt.Errorf("the snapshot's root is %s %s, not %s %s", m.Root.Kind, m.Root.Digest, spec.Root.Kind, spec.Root.Digest)
	case m.Origin.Shape.Bare || want.Bare:
		return errors.New("a machine without the agent cannot be told that it is another now")
	case m.Resources != res:
		return fmt.Errorf("the snapshot's resources are %+v, not %+v", m.Resources, res)
	case m.Origin.Shape.Network != want.Network:
		return errors.New("a machine with a network cannot go on without one, nor the other way round")
	case m.Origin.Shape != want:
		return fmt.Errorf("the snapshot is of a machine of %+v, not %+v", m.Origin.Shape, want)
	}
	return nil
}
